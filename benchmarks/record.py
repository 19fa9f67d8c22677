"""Run one of the pytest-benchmark suites and record its figures with the machine they came from.

    python -m benchmarks.record tokenizing prefix_cache
    python -m benchmarks.report

Exit code 1 when a suite's own bound is missed. The suite "conversion" needs ``LLAMA_CPP_SOURCE`` and ``TORCH_PYTHON``,
as it says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_phi3.bench.machine import Machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite that is recorded.

    Attributes:
        name: of ``benchmarks/test_NAME.py`` and of ``benchmarks/results/NAME.json``.
        title: in the report.
        about: what it compares, for the report.
    """

    name: str
    title: str
    about: str


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "tokenizing",
            "Text to tokens and back",
            "Ours, which is llama.cpp's with the rules of Phi-3's added tokens around it, and Hugging Face's"
            " `tokenizers` library, on the demo model's vocabulary. Both give the same tokens and the same text. Ours"
            " remembers words: it has seen those of the texts before, unless they are said to be new. A ratio above 1"
            " says how many times as long the library takes.",
        ),
        Suite(
            "quantization",
            "The quantiser",
            "`edge-phi3 quantize` and the bare call of `llama_model_quantize` in a fresh process; both write the same"
            " tensors. Ours also plans the sizes first, shows progress, and waits until the disk has the file.",
        ),
        Suite(
            "prefix_cache",
            "The prefix cache",
            "Time to the first token behind 1,000 tokens that an earlier request shared, with the cache and without.",
        ),
        Suite(
            "http_overhead",
            "What HTTP costs",
            "`/chat` over one kept connection and the same request given to the engine's pipeline in the same"
            " process; and"
            " `/healthz`, `/livez` beside a server of a few lines that always sends the same bytes.",
        ),
        Suite(
            "conversion",
            "The converter",
            "A random bfloat16 checkpoint with Phi-3-mini's widths and 4 layers to F16: whole processes, imports"
            " included, from files in the system's cache. Ours and the bare bytes end when the disk has them,"
            " llama.cpp's converter when the system has them. Memory is the largest private memory.",
        ),
        Suite(
            "generation_kernels",
            "Choosing tokens",
            "What one decode step costs beyond the model, with a vocabulary of 32,064 words and prompts of 512 tokens,"
            " as a multiple of one `argmax` over the same rows: the least of 150 rounds on both sides, on one core. The"
            " last three cases are the same choice for 16 rows through llama.cpp's sampler chain, row by row.",
        ),
    )
}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark: seconds of a round, and what else it says."""

    name: str
    median: float
    least: float
    rounds: int
    figures: dict[str, float | str]


class SuiteRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a suite."""

    machine: Machine
    command: str
    results: list[Entry]


def read_pytest_benchmark(data: dict[str, Any]) -> list[Entry]:
    """Take what is compared out of pytest-benchmark's JSON."""
    return [
        Entry(
            name=item["extra_info"].pop("case", item["name"]),
            median=item["stats"]["median"],
            least=item["stats"]["min"],
            rounds=item["stats"]["rounds"],
            figures={name: value for name, value in item["extra_info"].items() if value is not None},
        )
        for item in data["benchmarks"]
    ]


def main() -> int:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"default: {', '.join(SUITES)}")
    parser.add_argument("--output", type=Path, help="write the figures of the one suite named here")
    arguments = parser.parse_args()
    if arguments.output and len(arguments.suites) != 1:
        parser.error("--output is for one suite; name it, and no other.")
    failed = False
    for name in arguments.suites or SUITES:
        if name not in SUITES:
            parser.error(f"{name} is not a suite that is recorded; these are: {', '.join(SUITES)}")
        machine = Machine.here()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            test = Path(__file__).with_name(f"test_{name}.py")
            command = [sys.executable, "-m", "pytest", "-q", test, f"--benchmark-json={path}"]
            # A bound that is missed is a result as well; it makes the exit code 1.
            code = subprocess.run(command, check=False).returncode
            if code not in {0, 1} or not path.exists():
                sys.exit(f"The suite {name} was not measured; pytest's exit code is {code}.")
            failed |= bool(code)
            entries = read_pytest_benchmark(msgspec.json.decode(path.read_bytes()))
        record = SuiteRecord(machine=machine, command=f"python -m benchmarks.record {name}", results=entries)
        output = arguments.output or RESULTS / f"{name}.json"
        output.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
