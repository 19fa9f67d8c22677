"""Mutants of the files that people bring, each given to a verb: it says a sentence, or does its work."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("count", [60, pytest.param(800, marks=pytest.mark.soak)])
def test_no_mutant_of_a_file_ends_a_verb_but_by_a_sentence(count: int) -> None:
    """In a process of its own: one that forks must not have threads."""
    command = [
        sys.executable,
        "-m",
        "tests.support.hostile_files",
        "--mutants",
        str(count),
        "--jobs",
        "2",
        "--seed",
        "7",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == f"{count} mutants, 0 failed\n", result.stdout + result.stderr
