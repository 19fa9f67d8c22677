"""`edge-phi3 convert` on the command line: what it prints where, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def edge_phi3(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_phi3", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_the_path_is_the_only_thing_on_stdout(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    finished = edge_phi3("convert", pristine, "-o", output, "--outtype", "q8_0")
    assert (finished.returncode, finished.stdout) == (0, f"{output}\n")
    assert output.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("config.json", "has no config.json"),
        ("model-00002-of-00002.safetensors", "The shard 'model-00002-of-00002.safetensors', which"),
        ("tokenizer.model", "tokenizer.model cannot be read: No such file or directory"),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_and_exit_code_1(
    damage: str, sentence: str, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / damage).unlink()
    finished = edge_phi3("convert", checkpoint, "-o", tmp_path / "output" / "out.gguf")
    assert (finished.returncode, finished.stdout) == (1, "")
    assert sentence in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "output").exists()


def test_an_existing_output_needs_force(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_text("precious")
    finished = edge_phi3("convert", pristine, "-o", output)
    assert finished.returncode == 1
    assert "give --force to replace it" in finished.stderr
    assert output.read_text() == "precious"
    assert edge_phi3("convert", pristine, "-o", output, "--force").returncode == 0


def test_an_unknown_type_is_wrong_usage(pristine: Path, tmp_path: Path) -> None:
    finished = edge_phi3("convert", pristine, "-o", tmp_path / "out.gguf", "--outtype", "q4_0")
    assert finished.returncode == 2
    assert "q4_0" in finished.stderr
