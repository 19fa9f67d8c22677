"""`edge-phi3 pull` on the command line: into the store, and into a folder of one's own."""

from __future__ import annotations

import json
import re
import shutil
import types
from pathlib import Path

import pytest

from edge_phi3.catalog import Catalog
from edge_phi3.catalog.build import fetch_checkpoint
from edge_phi3.catalog.hub import Repository
from edge_phi3.conversion.journey import Journey
from edge_phi3.conversion.metadata import SourceInfo
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.files import DiskFullError
from edge_phi3.progress import SilentProgress
from tests.catalog.hub_server import HubServer
from tests.test_cli import edge_phi3


def pull(output: Path) -> list[dict[str, object]]:
    finished = edge_phi3("pull", "owner/tiny", "--quant", "Q8_0", "--output-dir", str(output), "--json")
    assert finished.returncode == 0, finished.stderr
    rows: list[dict[str, object]] = json.loads(finished.stdout)
    return rows


def test_a_repository_is_downloaded_once_and_made_as_a_folder_is(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    rows = pull(tmp_path / "out")
    assert [row["type"] for row in rows] == ["BF16", "Q8_0"]
    [folder] = (tmp_path / "out").glob("checkpoint-*")
    source = SourceInfo("owner/tiny", hub.repositories["owner/tiny"].commit)
    (tmp_path / "local").mkdir()
    local = Journey(tmp_path / "local", "tiny").run(folder, [QUANTIZATION_TYPES["Q8_0"]], source=source)
    assert [row["sha256"] for row in rows] == [stop.made.seen.sha256 for stop in local]
    (tmp_path / "out" / "tiny-Q8_0.gguf").unlink()
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    sent = {name: hub.bytes_sent(name) for name in shards}
    assert [row["made_now"] for row in pull(tmp_path / "out")] == [False, True]
    assert {name: hub.bytes_sent(name) for name in shards} == sent
    assert all(size > 0 for size in sent.values())


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
