"""`edge-phi3 convert` against llama.cpp's converter and against the disk, on a checkpoint of 1.3 GB.

    TORCH_PYTHON=torch/bin/python pytest benchmarks/test_conversion.py

llama.cpp's converter is measured when ``TORCH_PYTHON`` names an interpreter with torch, transformers and
sentencepiece. Both converters are whole processes, imports included, and read a checkpoint that the system has in its
cache; ours ends when the disk has the file, theirs when the system has it.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.timings import timings
from tests.support.models import write_random_checkpoint
from tests.support.peers import llama_cpp_source, torch_python

ROUNDS = 3
MAX_PRIVATE_BYTES = 400e6
OURS, THEIRS = "`edge-phi3 convert`", "llama.cpp's converter"

_PROGRAM = (
    "import sys; from pathlib import Path; from edge_phi3.conversion.convert import convert\n"
    "convert(Path(sys.argv[1]), Path(sys.argv[2]), outtype='f16')"
)

_medians: dict[str, float] = {}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bfloat16 checkpoint: Phi-3-mini's widths, 4 layers, two shards."""
    return write_random_checkpoint(tmp_path_factory.mktemp("conversion") / "phi-3-random", "0.65b", shards=2)


@pytest.fixture
def output(checkpoint: Path) -> Path:
    """Where the GGUF goes."""
    return checkpoint.parent / "out.gguf"


def peak_private_bytes(arguments: list[str | Path]) -> int:
    """Run a program and return the largest private memory (USS) seen while it ran, in bytes."""
    peak = 0
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        child = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, child.memory_full_info().uss)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                break
            time.sleep(0.05)
    assert process.returncode == 0
    return peak


def measure(benchmark: BenchmarkFixture, name: str, output: Path, run: Callable[[], int]) -> int:
    """Time `run`, the disk at rest before each round; return the largest of what it returns."""
    peaks: list[int] = []
    before = _cpu_seconds()

    def start_afresh() -> None:
        output.unlink(missing_ok=True)
        os.sync()

    benchmark.pedantic(lambda: peaks.append(run()), setup=start_afresh, rounds=ROUNDS)
    _medians[name] = timings(benchmark).median
    benchmark.extra_info |= {
        "case": name,
        "megabytes_written": round(output.stat().st_size / 1e6),
        "private_megabytes": round(max(peaks) / 1e6, 1),
        "cpu_seconds": round((_cpu_seconds() - before) / ROUNDS, 2),
        "times_ours": round(_medians[name] / _medians[OURS], 2),
    }
    return max(peaks)


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def test_edge_phi3(benchmark: BenchmarkFixture, checkpoint: Path, output: Path) -> None:
    """Ours, f16, until the file is on the disk."""
    arguments: list[str | Path] = [sys.executable, "-c", _PROGRAM, checkpoint, output]
    assert measure(benchmark, OURS, output, lambda: peak_private_bytes(arguments)) < MAX_PRIVATE_BYTES


def test_disk(benchmark: BenchmarkFixture, checkpoint: Path, output: Path) -> None:
    """Writing as many bytes as the GGUF has, and waiting for the disk."""
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    block = os.urandom(8 << 20)

    def write() -> int:
        with output.open("wb", buffering=0) as file:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        return 0

    measure(benchmark, "writing as many bytes", output, write)


def test_llama_cpp(benchmark: BenchmarkFixture, checkpoint: Path, output: Path) -> None:
    """llama.cpp's, f16; ours takes at most half of its time."""
    python = torch_python()
    if python is None:
        pytest.skip("TORCH_PYTHON names no interpreter with torch")
    script = llama_cpp_source() / "convert_hf_to_gguf.py"
    arguments: list[str | Path] = [python, script, checkpoint, "--outtype", "f16", "--outfile", output]
    measure(benchmark, THEIRS, output, lambda: peak_private_bytes(arguments))
    assert _medians[OURS] <= _medians[THEIRS] / 2
