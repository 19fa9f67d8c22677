"""`edge-phi3 convert` and `quantize` on the command line: what they print where, and their exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES


def edge_phi3(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_phi3", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_a_damaged_checkpoint_is_one_sentence_and_exit_code_1(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.model").unlink()
    finished = edge_phi3("convert", checkpoint, "-o", tmp_path / "output" / "out.gguf")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "tokenizer.model cannot be read: No such file or directory" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "output").exists()


def test_an_existing_output_needs_force(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_text("precious")
    finished = edge_phi3("convert", pristine, "-o", output, "--outtype", "q8_0")
    assert finished.returncode == 1
    assert "give --force to replace it" in finished.stderr
    assert output.read_text() == "precious"
    forced = edge_phi3("convert", pristine, "-o", output, "--outtype", "q8_0", "--force")
    assert (forced.returncode, forced.stdout) == (0, f"{output}\n")
    assert output.read_bytes()[:4] == b"GGUF"


def test_wrong_usage_has_exit_code_2(pristine: Path, tmp_path: Path) -> None:
    finished = edge_phi3("convert", pristine, "-o", tmp_path / "out.gguf", "--outtype", "q4_0")
    assert finished.returncode == 2
    assert "q4_0" in finished.stderr
    finished = edge_phi3("quantize", tmp_path / "model.gguf")
    assert finished.returncode == 2
    assert "-o: give the GGUF file to write" in finished.stderr


def test_the_list_shows_every_type_and_which_need_a_matrix() -> None:
    lines = edge_phi3("quantize", "--list").stdout.splitlines()[1:]
    shown = {line.split()[0]: " needed " in line for line in lines if line.split()[0] in QUANTIZATION_TYPES}
    assert shown == {name: type_.needs_imatrix for name, type_ in QUANTIZATION_TYPES.items()}


def test_a_dry_run_tells_the_size_within_one_percent_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    arguments = ("quantize", source, "-o", tmp_path / "small.gguf", "--type", "Q4_K_M")
    told = edge_phi3(*arguments, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert not (tmp_path / "small.gguf").exists()
    assert edge_phi3(*arguments).returncode == 0
    assert int(told.stdout) == pytest.approx((tmp_path / "small.gguf").stat().st_size, rel=0.01)
    needy = edge_phi3("quantize", source, "--type", "Q2_K_S", "--dry-run")
    assert "Q2_K_S needs an importance matrix: --imatrix." in needy.stderr
