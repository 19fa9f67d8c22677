"""`edge-phi3 quantize` on the command line: the list of types, and sizes told without writing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from tests.conversion.random_gguf import write_random


def edge_phi3(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_phi3", "quantize", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_list_shows_every_type_and_which_need_a_matrix() -> None:
    lines = edge_phi3("--list").stdout.splitlines()[1:]
    shown = {line.split()[0]: " needed " in line for line in lines if line.split()[0] in QUANTIZATION_TYPES}
    assert shown == {name: type_.needs_imatrix for name, type_ in QUANTIZATION_TYPES.items()}


def test_a_dry_run_tells_the_size_within_one_percent_and_writes_nothing(tmp_path: Path) -> None:
    source, output = tmp_path / "model.gguf", tmp_path / "small.gguf"
    write_random(source, layers=1, vocabulary=64)
    told = edge_phi3(source, "-o", output, "--type", "Q4_K_M", "--dry-run")
    assert told.returncode == 0, told.stderr
    assert not output.exists()
    assert edge_phi3(source, "-o", output, "--type", "Q4_K_M").returncode == 0
    assert int(told.stdout) == pytest.approx(output.stat().st_size, rel=0.01)
    assert "Q2_K_S needs an importance matrix: --imatrix." in edge_phi3(source, "--type", "Q2_K_S", "--dry-run").stderr


def test_without_an_output_it_is_wrong_usage(tmp_path: Path) -> None:
    finished = edge_phi3(tmp_path / "model.gguf")
    assert finished.returncode == 2
    assert "-o: give the GGUF file to write" in finished.stderr
