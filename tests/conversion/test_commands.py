"""`edge-phi3 convert` and `quantize` on the command line: what they print where, and their exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from tests.test_cli import edge_phi3


def test_a_damaged_checkpoint_is_one_sentence_and_exit_code_1(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.model").unlink()
    finished = edge_phi3("convert", str(checkpoint), "-o", str(tmp_path / "output" / "out.gguf"))
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "tokenizer.model cannot be read: No such file or directory" in finished.stderr
    assert not (tmp_path / "output").exists()


def test_wrong_usage_has_exit_code_2(pristine: Path, tmp_path: Path) -> None:
    finished = edge_phi3("convert", str(pristine), "-o", str(tmp_path / "out.gguf"), "--outtype", "q4_0")
    assert finished.returncode == 2
    assert "q4_0" in finished.stderr
    finished = edge_phi3("quantize", str(tmp_path / "model.gguf"))
    assert finished.returncode == 2
    assert "-o: give the GGUF file to write" in finished.stderr


def test_the_list_shows_every_type_and_which_need_a_matrix() -> None:
    lines = edge_phi3("quantize", "--list").stdout.splitlines()[1:]
    shown = {line.split()[0]: " needed " in line for line in lines if line.split()[0] in QUANTIZATION_TYPES}
    assert shown == {name: type_.needs_imatrix for name, type_ in QUANTIZATION_TYPES.items()}


def test_a_dry_run_tells_the_size_within_one_percent_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    arguments = ("quantize", str(source), "-o", str(tmp_path / "small.gguf"), "--type", "Q4_K_M")
    told = edge_phi3(*arguments, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert not (tmp_path / "small.gguf").exists()
    assert edge_phi3(*arguments).returncode == 0
    assert int(told.stdout) == pytest.approx((tmp_path / "small.gguf").stat().st_size, rel=0.01)
    needy = edge_phi3("quantize", str(source), "--type", "Q2_K_S", "--dry-run")
    assert "Q2_K_S needs an importance matrix: --imatrix." in needy.stderr
