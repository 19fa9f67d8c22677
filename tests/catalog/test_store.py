"""Models of this machine, what makes a stored model whole, a disk that does not play along, and `edge-phi3 pull`.

And which files of a repository hold the weights: those that the converter takes of a folder.
"""

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest

from edge_phi3.catalog import Catalog, CatalogError
from edge_phi3.catalog.build import fetch_checkpoint
from edge_phi3.catalog.hub import Repository
from edge_phi3.conversion import ConversionError
from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.files import DiskFullError
from edge_phi3.progress import SilentProgress
from tests.catalog.conftest import SHARD, Notes
from tests.catalog.hub_server import HubServer
from tests.catalog.hub_server import Repository as HubRepository
from tests.conversion.edits import GHOST, INDEX, Edit, each, index, one_shard, removed, written
from tests.golden.gguf_digests import describe
from tests.test_cli import edge_phi3


def test_a_checkpoint_is_made_once_and_found_again(catalog: Catalog, checkpoint: Path, notes: Notes) -> None:
    first = catalog.resolve(str(checkpoint), progress=notes)
    assert (first.name, first.quant, first.revision) == ("tiny-phi3", "Q4_K_M", None)
    assert catalog.resolve(str(checkpoint), progress=notes) == first
    assert notes.titles == ["Converting tiny-phi3", "Quantising tiny-phi3 to Q4_K_M"]
    text = first.path.with_name("manifest.json").read_text()
    assert '\n  "name": "tiny-phi3"' in text, "people read it too"
    assert msgspec.json.decode(text, type=type(first.manifest)) == first.manifest


@pytest.mark.parametrize("whole_file", [1 << 30, 1000], ids=["by content", "by time and ends"])
def test_a_changed_checkpoint_is_another_model(
    catalog: Catalog, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_file: int
) -> None:
    monkeypatch.setattr("edge_phi3.catalog.store._WHOLE_FILE", whole_file)
    copy = tmp_path / "copy" / "tiny-phi3"
    shutil.copytree(checkpoint, copy)
    first = catalog.resolve(str(copy), quant="F16")
    assert catalog.resolve(str(checkpoint), quant="F16").path == first.path
    content = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second = catalog.resolve(str(copy), quant="F16")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert len({first.path, second.path, catalog.resolve(str(copy), quant="F16").path}) == 3


def test_the_demo_survives_a_new_installation(
    catalog: Catalog, tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalog.resolve(None)
    assert (first.name, first.quant) == ("phi-3-demo", "Q4_K_M")
    elsewhere = tmp_path / "other-site-packages" / "phi-3-demo"
    shutil.copytree(DEMO_CHECKPOINT, elsewhere, copy_function=shutil.copyfile)
    monkeypatch.setattr("edge_phi3.catalog.reference.DEMO_CHECKPOINT", elsewhere)
    assert catalog.resolve("phi-3-demo", progress=notes) == first
    assert notes.titles == []


@pytest.mark.parametrize("damage", ["no-manifest", "cut-manifest", "other-format", "cut-model", "name-outside"])
def test_what_is_not_whole_is_made_again(catalog: Catalog, checkpoint: Path, damage: str) -> None:
    first = catalog.resolve(str(checkpoint), quant="F16")
    content = first.path.read_bytes()
    manifest = first.path.with_name("manifest.json")
    fields = json.loads(manifest.read_text())
    (first.path.parent.parent / "outside.gguf").write_bytes(b"x")
    texts = {
        "cut-manifest": manifest.read_text()[:-20],
        "other-format": json.dumps(fields | {"format": 0}),
        "name-outside": json.dumps(fields | {"files": [fields["files"][0] | {"name": "../outside.gguf", "size": 1}]}),
    }
    if damage in texts:
        manifest.write_text(texts[damage])
    elif damage == "no-manifest":
        manifest.unlink()
    else:
        first.path.write_bytes(content[:-1])
    assert [model.path for model in catalog.stored()] == []
    second = catalog.resolve(str(checkpoint), quant="F16")
    assert second.path == first.path
    assert second.path.read_bytes() == content
    catalog.verify(second)


def test_a_killed_making_goes_on_after_its_conversion(
    catalog: Catalog, checkpoint: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edge_phi3.conversion.journey.quantize", killed)
    with pytest.raises(KeyboardInterrupt):
        catalog.resolve(str(checkpoint))
    monkeypatch.undo()
    stale = next(catalog.store.glob("*/.work-*")) / ".auto.gguf.0123abcd.partial"
    stale.write_bytes(b"left by a process that was killed")
    model = catalog.resolve(str(checkpoint), progress=notes)
    assert notes.titles == ["Quantising tiny-phi3 to Q4_K_M"]
    assert model.manifest is not None
    assert {file.name for file in model.manifest.made_from} == {path.name for path in checkpoint.iterdir()}
    assert not list(catalog.store.glob("*/.work-*"))


def test_a_checkpoint_that_cannot_be_converted_leaves_nothing(
    catalog: Catalog, checkpoint: Path, tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(checkpoint, tmp_path / "bad"))
    (bad / SHARD).write_bytes((bad / SHARD).read_bytes()[:-100])
    with pytest.raises(ConversionError):
        catalog.resolve(str(bad))
    assert [path.name for path in catalog.store.iterdir()] == [".locks"]


def test_too_little_space_is_told_before_any_work(
    catalog: Catalog, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10_000))
    with pytest.raises(DiskFullError, match=r"Q4_K_M, BF16 will take about .* kB left; free .* EDGE_PHI3_STORE to"):
        catalog.resolve(str(checkpoint))


def test_a_store_that_cannot_be_written_is_told(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CatalogError, match=r"The store is \S+/file/store: free some space, mend its permissions"):
        Catalog(tmp_path / "file" / "store").resolve(str(checkpoint))


def test_the_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_PHI3_STORE", str(tmp_path / "here"))
    assert Catalog().store == tmp_path / "here"
    assert Catalog(tmp_path / "given").store == tmp_path / "given"
    monkeypatch.delenv("EDGE_PHI3_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Catalog().store == tmp_path / "cache" / "edge-phi3" / "models"


def test_a_second_start_imports_neither_the_hubs_client_nor_the_converter(catalog: Catalog) -> None:
    catalog.resolve(None)
    script = (
        "import sys; from pathlib import Path; from edge_phi3.catalog import Catalog\n"
        "Catalog(Path(sys.argv[1])).resolve(None)\n"
        "print([name for name in ('huggingface_hub', 'gguf', 'llama_cpp', 'numpy') if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, str(catalog.store)], capture_output=True, text=True, check=True
    )
    assert finished.stdout == "[]\n"


def test_a_repository_is_downloaded_once(hub: HubServer, tmp_path: Path) -> None:
    def pull() -> list[tuple[str, bool]]:
        finished = edge_phi3("pull", "owner/tiny", "--quant", "Q8_0", "--output-dir", str(tmp_path), "--json")
        assert finished.returncode == 0, finished.stderr
        return [(row["type"], row["made_now"]) for row in json.loads(finished.stdout)]

    assert pull() == [("BF16", True), ("Q8_0", True)]
    (tmp_path / "tiny-Q8_0.gguf").unlink()
    asked = hub.bytes_sent(SHARD)
    assert pull() == [("BF16", False), ("Q8_0", True)]
    assert hub.bytes_sent(SHARD) == asked == len(hub.repositories["owner/tiny"].files[SHARD])


def test_a_full_disk_is_told_before_the_weights_are_downloaded(
    hub: HubServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    # Download, conversion and a Q8_0 take more than 2.5 times the weights, and less than 2.6 times.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=int(size * 2.5)))
    repository = Repository("owner/tiny", "main", SilentProgress())
    with pytest.raises(DiskFullError, match=r"owner/tiny and what is made of it will take about .*, or go elsewhere\."):
        fetch_checkpoint(repository, tmp_path, [None, "Q8_0"], "go elsewhere")
    assert not list(tmp_path.glob("**/*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=int(size * 2.6)))
    fetch_checkpoint(repository, tmp_path, [None, "Q8_0"], "go elsewhere")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_several_quantisations_come_from_one_download_and_one_conversion(hub: HubServer, tmp_path: Path) -> None:
    kinds = ["BF16", "Q4_0", "Q5_0"]
    options = [argument for quant in [*kinds, "q4_0"] for argument in ("--quant", quant)]
    finished = edge_phi3("pull", "owner/tiny", *options, "--store", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    shelf = tmp_path / "owner--tiny@main"
    assert finished.stdout.splitlines() == [str(shelf / kind / f"tiny-{kind}.gguf") for kind in kinds]
    assert finished.stderr.count("Converting tiny.") == 1
    assert sorted(path.name for path in shelf.iterdir()) == kinds
    for kind in kinds:
        alone = Catalog(tmp_path / "other").resolve("owner/tiny", quant=kind)
        assert (shelf / kind / f"tiny-{kind}.gguf").read_bytes() == alone.path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("demo", "--imatrix", "auto"), 2, "--imatrix: give --output-dir too; the store's models do without."),
        (("demo", "--json"), 2, "--json: give --output-dir too"),
        (("o/r/x.gguf", "--output-dir", "out"), 2, "o/r/x.gguf is a GGUF already; quantise it with"),
        (("demo", "--quant", "IQ2_XS"), 1, "IQ2_XS needs an importance matrix, .* add --output-dir DIR"),
        (("demo", "--quant", "IQ2_XS", "--imatrix", "none", "--output-dir", "out"), 1, "IQ2_XS needs an .* matrix; g"),
        (("demo", "--imatrix", "absent.gguf", "--output-dir", "out"), 1, "absent.gguf cannot be read: No such file"),
    ],
)
def test_what_cannot_be_pulled_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = edge_phi3("pull", *arguments)
    assert finished.returncode == code
    assert re.search(words, finished.stderr), finished.stderr
    assert finished.stdout == ""


TAKEN: dict[str, Edit] = {
    "one shard without an index": one_shard,
    "shards without an index": each(removed(INDEX), written("adapter_model.safetensors")),
    "an index of older shards": index(lambda found: {k: v.replace("00002.s", "00003.s") for k, v in found.items()}),
    "an index with a buffer": index(lambda found: found | {GHOST: "model-00003-of-00003.safetensors"}),
    "an index beside one file": each(
        one_shard,
        lambda folder: (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors"),
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "../b.safetensors"}}'),
    ),
    "chat_template.json": lambda folder: (folder / "chat_template.json").write_text('{"chat_template": "mine"}'),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_repository_is_taken_as_its_folder_is(
    hub: HubServer, catalog: Catalog, checkpoint: Path, name: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "tiny-phi3"))
    TAKEN[name](folder)
    hub.repositories["owner/odd"] = HubRepository.of(folder)
    found = describe(catalog.resolve("owner/odd", quant="F16").path)
    assert found == describe(convert(folder, tmp_path / "out.gguf", outtype="f16").path)
