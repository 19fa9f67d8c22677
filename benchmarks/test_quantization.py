"""`edge-phi3 quantize` against the bare call of ``llama_model_quantize``, both as whole processes.

    pytest benchmarks/test_quantization.py

The model is random, with Phi-3's vocabulary and a third of its width: 250 MB in F16. Turns alternate, so that a slow
minute of the machine hits both. Ours waits for the disk; so that both are asked for the same, the bare call is followed
by an fsync as well.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.timings import timings
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantization_types import quantization_type
from edge_phi3.system_resources import usable_cores
from tests.support.models import write_random_checkpoint

ROUNDS = 3

_BARE = """
import ctypes, os, sys, llama_cpp
source, output, ftype, threads = sys.argv[1:]
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(ftype), int(threads)
status = llama_cpp.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params))
with open(output, "rb") as file:
    os.fsync(file.fileno())
sys.exit(status)
"""
_OURS = "from edge_phi3.cli import main; main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random F16 model."""
    folder = tmp_path_factory.mktemp("quantization")
    checkpoint = write_random_checkpoint(folder / "checkpoint", "0.12b")
    return convert(checkpoint, folder / "model-f16.gguf", outtype="f16").path


def run(*command: str | Path) -> float:
    """Run a program to its end; return the seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", *command], check=True, capture_output=True)
    return time.perf_counter() - started


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_quantize(kind: str, model: Path, tmp_path: Path, benchmark: BenchmarkFixture) -> None:
    """The same type, the same threads; the tensors must be the same bytes."""
    ours, bare = tmp_path / "ours.gguf", tmp_path / "bare.gguf"
    threads = str(usable_cores())
    others: list[float] = []

    def other() -> None:
        others.append(run(_BARE, model, bare, str(quantization_type(kind).ftype), threads))

    benchmark.pedantic(
        lambda: run(_OURS, "quantize", model, "-o", ours, "--type", kind, "--threads", threads, "--force"),
        setup=other,
        rounds=ROUNDS,
    )
    tensors = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} for path in (ours, bare)]
    assert tensors[0] == tensors[1]
    ratio = timings(benchmark).median / statistics.median(others)
    benchmark.extra_info |= {
        "case": f"{kind}, {model.stat().st_size / 1e6:.0f} MB",
        "bare_call_milliseconds": round(statistics.median(others) * 1e3),
        "times_the_bare_call": round(ratio, 2),
    }
    print(f"\n{kind}: {ratio:.2f} times the bare call's {statistics.median(others):.2f} s")
