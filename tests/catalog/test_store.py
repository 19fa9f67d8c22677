"""Models from this machine, what makes a stored model whole, and a disk or a store that does not play along."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest

from edge_phi3.catalog import Catalog, CatalogError
from edge_phi3.conversion.errors import ConversionError
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.files import DiskFullError
from tests.catalog.conftest import Notes


def test_a_gguf_is_served_where_it_lies(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"GGUF and more")
    model = catalog.resolve(str(path))
    assert (model.path, model.name, model.quant, model.manifest) == (path, "mine", None, None)
    assert not catalog.store.exists()


def test_a_checkpoint_is_made_once_and_found_again(catalog: Catalog, checkpoint: Path, notes: Notes) -> None:
    first = catalog.resolve(str(checkpoint), progress=notes)
    assert (first.name, first.quant, first.revision) == ("tiny-phi3", "Q4_K_M", None)
    made = first.path.stat()
    assert catalog.resolve(str(checkpoint)) == first
    assert first.path.stat().st_mtime_ns == made.st_mtime_ns
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
    shard = next(copy.glob("*-00002-of-00002.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    second = catalog.resolve(str(copy), quant="F16")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert len({first.path, second.path, catalog.resolve(str(copy), quant="F16").path}) == 3


def test_the_demo_survives_a_new_installation(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalog.resolve(None)
    assert (first.name, first.quant) == ("phi-3-demo", "Q4_K_M")
    elsewhere = tmp_path / "other-site-packages" / "phi-3-demo"
    shutil.copytree(DEMO_CHECKPOINT, elsewhere, copy_function=shutil.copyfile)
    monkeypatch.setattr("edge_phi3.catalog.reference.DEMO_CHECKPOINT", elsewhere)
    made = first.path.stat()
    assert catalog.resolve("phi-3-demo") == first
    assert first.path.stat().st_mtime_ns == made.st_mtime_ns


@pytest.mark.parametrize("damage", ["no-manifest", "cut-manifest", "other-format", "cut-model", "name-outside"])
def test_what_is_not_whole_is_made_again(catalog: Catalog, checkpoint: Path, damage: str) -> None:
    first = catalog.resolve(str(checkpoint), quant="F16")
    content = first.path.read_bytes()
    manifest = first.path.with_name("manifest.json")
    fields = json.loads(manifest.read_text())
    if damage == "no-manifest":
        manifest.unlink()
    elif damage == "cut-manifest":
        manifest.write_text(manifest.read_text()[:-20])
    elif damage == "other-format":
        manifest.write_text(json.dumps(fields | {"format": 0}))
    elif damage == "cut-model":
        first.path.write_bytes(content[:-1])
    elif damage == "name-outside":
        outside = first.path.parent.parent / "outside.gguf"
        outside.write_bytes(b"x")
        fields["files"][0] |= {"name": "../outside.gguf", "size": 1}
        manifest.write_text(json.dumps(fields))
    assert [model.path for model in catalog.stored()] == []
    second = catalog.resolve(str(checkpoint), quant="F16")
    assert second.path == first.path
    assert second.path.read_bytes() == content
    catalog.verify(second)


def test_verify_finds_a_flipped_bit(catalog: Catalog, checkpoint: Path) -> None:
    model = catalog.resolve(str(checkpoint), quant="F16")
    content = bytearray(model.path.read_bytes())
    content[len(content) // 2] ^= 1
    model.path.write_bytes(content)
    with pytest.raises(CatalogError, match=r"tiny-phi3-F16\.gguf is damaged; delete its folder and pull tiny-phi3 a"):
        catalog.verify(model)


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
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    shard = next(bad.glob("*-00001-of-00002.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConversionError):
        catalog.resolve(str(bad))
    assert [path for path in catalog.store.rglob("*") if ".locks" not in path.parts and path.name != ".locks"] == []


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
