"""`scripts/convert_and_quantize.py` with a repository of the Hub: what it downloads, and that it goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from edge_phi3.catalog.build import Repository
from edge_phi3.catalog.reference import HubCheckpoint
from edge_phi3.conversion.convert import SourceInfo
from edge_phi3.conversion.journey import run_journey
from edge_phi3.files import DiskFullError
from edge_phi3.progress import SilentProgress
from tests.catalog.hub_server import HubServer

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_and_quantize.py"


def run(output: Path) -> list[dict[str, object]]:
    command = [sys.executable, str(SCRIPT), "owner/tiny", "--quant", "Q8_0", "--output-dir", str(output), "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr
    rows: list[dict[str, object]] = json.loads(finished.stdout)
    return rows


def test_a_repository_is_downloaded_once_and_made_as_a_folder_is(
    hub: HubServer, checkpoint: Path, tmp_path: Path
) -> None:
    rows = run(tmp_path / "out")
    assert [row["type"] for row in rows] == ["BF16", "Q8_0"]
    [folder] = (tmp_path / "out").glob("checkpoint-*")
    source = SourceInfo("owner/tiny", hub.repositories["owner/tiny"].commit)
    local = run_journey(folder, ["Q8_0"], tmp_path / "local", name="tiny", source=source)
    assert [row["sha256"] for row in rows] == [stop.made.seen.sha256 for stop in local]
    (tmp_path / "out" / "tiny-Q8_0.gguf").unlink()
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    sent = {name: hub.bytes_sent(name) for name in shards}
    assert [row["made_now"] for row in run(tmp_path / "out")] == [False, True]
    assert {name: hub.bytes_sent(name) for name in shards} == sent
    assert all(size > 0 for size in sent.values())


def test_a_full_disk_is_told_before_the_weights_are_downloaded(
    hub: HubServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    usage = namedtuple("usage", ["total", "used", "free"])  # noqa: PYI024 - as shutil's own
    # Download, conversion and a Q8_0 take more than 2.5 times the weights, and less than 2.6 times.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size * 9, 0, int(size * 2.5)))
    repository = Repository(HubCheckpoint("owner/tiny", "main", "owner/tiny"), SilentProgress())
    with pytest.raises(DiskFullError, match=r"owner/tiny and what is made of it will take about .*, or go elsewhere\."):
        repository.fetch_checkpoint(tmp_path, [None, "Q8_0"], "go elsewhere")
    assert not list(tmp_path.glob("**/*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size * 9, 0, int(size * 2.6)))
    repository.fetch_checkpoint(tmp_path, [None, "Q8_0"], "go elsewhere")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
