"""Models of this machine, what makes a stored model whole, a disk that does not play along, and `edge-phi3 pull`.

And which files of a repository hold the weights: those that the converter takes of a folder.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

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
from tests.conversion import edits
from tests.golden.gguf_digests import describe
from tests.support.cases import cases
from tests.test_cli import Result, edge_phi3


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


def test_a_checkpoint_that_cannot_be_converted_and_a_store_that_cannot_be_written_are_told(
    catalog: Catalog, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Path(shutil.copytree(checkpoint, tmp_path / "bad"))
    (bad / SHARD).write_bytes((bad / SHARD).read_bytes()[:-100])
    with pytest.raises(ConversionError):
        catalog.resolve(str(bad))
    assert [path.name for path in catalog.store.iterdir()] == [".locks"], "a failure leaves nothing"
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CatalogError, match=r"The store is \S+/file/store: free some space, mend its permissions"):
        Catalog(tmp_path / "file" / "store").resolve(str(checkpoint))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10_000))
    with pytest.raises(DiskFullError, match=r"Q4_K_M, BF16 will take about .* kB left; free .* EDGE_PHI3_STORE to"):
        catalog.resolve(str(checkpoint))


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


@cases
def test_what_cannot_be_pulled_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    finished = edge_phi3("pull", *arguments)
    assert finished.returncode == code
    assert re.search(words, finished.stderr), finished.stderr
    assert finished.stdout == ""


@cases
def test_a_repository_is_taken_as_its_folder_is(
    hub: HubServer, catalog: Catalog, checkpoint: Path, changes: list[Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "tiny-phi3"))
    edits.apply(folder, *changes)
    hub.repositories["owner/odd"] = HubRepository.of(folder)
    found = describe(catalog.resolve("owner/odd", quant="F16").path)
    assert found == describe(convert(folder, tmp_path / "out.gguf", outtype="f16").path)


# -- `edge-phi3 models`, and models that stay whole while they are made anew


_KILLED = """
import os, signal, sys
from pathlib import Path
from edge_phi3.catalog import Catalog, build
def killed(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
{where} = killed
Catalog(Path(sys.argv[1])).resolve(sys.argv[2], quant="F16", refresh=True)
"""


def models(catalog: Catalog, *arguments: str) -> Result:
    return edge_phi3("models", *arguments, EDGE_PHI3_STORE=str(catalog.store), COLUMNS="200")


def test_the_store_is_listed_checked_and_cleared(hub: HubServer, catalog: Catalog, checkpoint: Path) -> None:
    first, second = (catalog.resolve("owner/tiny", quant=quant) for quant in ("F16", "Q8_0"))
    catalog.resolve(str(checkpoint), quant="F16")
    os.utime(second.path.with_name("manifest.json"), (0, 0))
    work = first.path.parent.with_name(".work-unfinished")
    work.mkdir()
    (work / "half").write_bytes(bytes(5000))
    head, *rows = models(catalog).stdout.splitlines()
    assert head.split() == ["model", "type", "size", "source", "revision", "last", "use"]
    today = time.strftime("%Y-%m-%d")
    for row, words in zip(rows, (
        ["owner/tiny", "F16", "owner/tiny", "c0ffeec0ffee", today],
        ["owner/tiny", "Q8_0", "owner/tiny", "c0ffeec0ffee", "1970-01-01"],
        ["tiny-phi3", "F16", "tiny-phi3", today],
        ["owner--tiny@main", "unfinished", "5.0", "kB"],
    ), strict=True):  # fmt: skip
        assert [word for word in row.split() if word in words] == words, row
    catalog.resolve("owner/tiny", quant="Q8_0")
    assert "1970" not in models(catalog).stdout, "it was asked for"

    assert models(catalog, "verify").stdout.count(": whole\n") == 3
    content = bytearray(second.path.read_bytes())
    content[len(content) // 2] ^= 1
    second.path.write_bytes(content)
    found = models(catalog, "verify", "owner/tiny")
    assert (found.returncode, found.stdout) == (1, "owner/tiny (F16): whole\nowner/tiny (Q8_0): damaged\n")
    assert f"{second.path} is damaged" in found.stderr
    second.path.write_bytes(b"GGUF")
    assert "Q8_0 holds no whole model" in models(catalog, "verify").stderr
    assert "damaged" in models(catalog).stdout

    assert models(catalog, "rm", "owner--tiny@main").stdout.split() == [str(work), str(second.path.parent)]
    assert models(catalog, "rm", "tiny-phi3", "--quant", "q8_0").stderr == (
        f"edge-phi3: tiny-phi3 as Q8_0 is not in the store {catalog.store}; it holds owner/tiny, tiny-phi3.\n"
    )
    assert models(catalog, "rm", "owner/tiny", "--quant", "f16").returncode == 0
    assert models(catalog, "rm", "tiny-phi3").returncode == 0
    assert [path.name for path in catalog.store.iterdir()] == [".locks"]


@cases
def test_a_killed_refresh_leaves_a_whole_model(
    hub: HubServer, catalog: Catalog, notes: Notes, reference: str, where: str
) -> None:
    ready = hub.repositories["o/ready"] = HubRepository(
        {f"model-0000{part}-of-00002.gguf": b"GGUF" + bytes([part]) * 100 for part in (1, 2)}
    )
    old = catalog.resolve(reference, quant="F16")
    for repository in (ready, hub.repositories["owner/tiny"]):
        repository.commit = "1" * 40
        repository.files |= {name: b"GGUF" + content for name, content in repository.files.items() if "gguf" in name}
    script = _KILLED.format(where=where)
    killed = subprocess.run([sys.executable, "-c", script, str(catalog.store), reference], check=False)
    assert killed.returncode == -signal.SIGKILL
    after = catalog.resolve(reference, quant="F16", progress=notes)
    assert notes.titles == [], "nothing is made for it"
    assert after == old or after.revision == "1" * 40
    catalog.verify(after)
    new = catalog.resolve(reference, quant="F16", refresh=True)
    assert new.revision == "1" * 40
    catalog.verify(new)
    assert new.manifest is not None
    names = {path.name for path in new.path.parent.iterdir()}
    assert names >= {"manifest.json", *(file.name for file in new.manifest.files)}
    new.path.write_bytes(b"other")
    with pytest.raises(CatalogError, match="is damaged"):
        catalog.verify(new)
