"""Measurements that load llama.cpp run in processes of their own: a crash is a failed step, memory is given back."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec


def run_module(
    module: str,
    arguments: Sequence[str | Path],
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
    timeout: float | None = None,
) -> Any:
    """Run a module of this folder, and give what it wrote with `answer`.

    Args:
        module: its name.
        arguments: its command line.
        python: what runs it.
        environment: variables to add.
        before: a command that runs it, such as a profiler's.
        timeout: seconds that it may take.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answer.json"
        variables = os.environ | dict(environment or {}) | {"BENCHMARK_ANSWER": str(output)}
        command = [*before, python, "-m", f"benchmarks.gpu.{module}", *map(str, arguments)]
        try:
            finished = subprocess.run(
                command,
                env=variables,
                stdout=sys.stderr,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{module} did not end within {timeout:g} s") from None
        if finished.returncode != 0 or not output.exists():
            raise RuntimeError(f"{module} ended with status {finished.returncode}: {finished.stderr.strip()[-1500:]}")
        return msgspec.json.decode(output.read_bytes())


def answer(value: Any) -> None:
    """Hand a result to whoever ran this process with `run_module`; print it when nobody did."""
    encoded = msgspec.json.encode(value)
    path = os.environ.get("BENCHMARK_ANSWER")
    if path:
        Path(path).write_bytes(encoded)
    else:
        print(msgspec.json.format(encoded).decode())
