"""Measure what docs/benchmarks.md shows, and make the page anew; under 30 minutes on two cores.

    python -m benchmarks.measure                                      # or: make measure
    python -m benchmarks.measure --only quantizations --only tokenizing
    TORCH_PYTHON=torch/bin/python python -m benchmarks.measure        # what is compared with transformers as well

`PARTS` is the table of all that is measured: scripts of this folder, and pytest-benchmark suites. Each part runs in a
process of its own, one after another. Its results replace the earlier ones only when it ran to its end, so that a part
that fails leaves the older figures, with their date, on the page. Exit code 1 when a part failed.

Building llama.cpp's programs, which happens once, takes as long again.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from edge_phi3.bench.machine import Machine
from edge_phi3.files import atomic_output
from tests.support.peers import TORCH_PYTHON, PeerError, build_peers, torch_python

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

_RATIOS = "benchmarks.engine_ratios --output {output} --rounds 3"


@dataclass(frozen=True, slots=True)
class Part:
    """Something that is measured.

    Attributes:
        name: what ``--only`` calls it; its results go to ``results/NAME.json``.
        title: its heading on the page.
        about: what is compared.
        script: module and options, ``{output}`` standing for the result file; None for the pytest-benchmark suite
            ``test_NAME.py``.
        peers: whether it needs llama.cpp's programs.
        torch: whether it needs an interpreter with torch and transformers.
    """

    name: str
    title: str
    about: str
    script: str | None = None
    peers: bool = False
    torch: bool = False


PARTS = (
    Part(
        "memory",
        "Which file for which memory",
        "What Phi-3-mini takes as each type, as `edge-phi3 fit` plans it: weights, KV cache, and llama.cpp's buffers"
        " for batches of 512 tokens.",
        script="benchmarks.memory --output {output}",
    ),
    Part(
        "quantizations",
        "How the quantisation levels compare",
        # One thread: threads that wait for each other would measure how busy the machine is.
        "The bundled demo model in every type.",
        script="benchmarks.quantizations --repetitions 3 --threads 1 --output {output}",
    ),
    Part(
        "engine",
        "The engine against llama.cpp's server",
        "The same GGUF, threads and requests, on the same libraries of llama.cpp, turn by turn. A ratio is the median"
        " of the turns' ratios and above 1 when ours is better. \"0.65b\" is a random model with Phi-3-mini's widths"
        " and 4 of its 32 layers. Answers are streamed: llama-server sends each token by itself, ours those of a tenth"
        " of a second together (`--stream-interval`).",
        script=f"{_RATIOS} --requests 2 --parts throughput,stream,health",
        peers=True,
    ),
    Part(
        "transformers",
        "The engine against transformers",
        "Whole answers over HTTP: ours, and transformers' text-generation pipeline in bfloat16, which generates one"
        ' answer at a time, as the original service does. "18m" is a random model of 18 million weights with Phi-3\'s'
        " vocabulary, ours in F32.",
        script=f"{_RATIOS} --models 18m --clients 1,4 --parts original",
        torch=True,
    ),
    Part(
        "prefix_cache",
        "The prefix cache",
        "Time to the first token behind 1,000 tokens that an earlier request shared, with the cache and without.",
    ),
    Part(
        "http_overhead",
        "What HTTP costs",
        "`/chat` over one kept connection, and the same request given to the engine's pipeline in the same process;"
        " `/healthz` and `/livez` beside a server of a few lines that always sends the same bytes.",
    ),
    Part(
        "conversion",
        "The converter",
        "A random bfloat16 checkpoint with Phi-3-mini's widths and 4 layers to F16: whole processes, imports included,"
        " from files in the system's cache. Ours and the bare bytes end when the disk has them, llama.cpp's converter"
        " when the system has them. Memory is the largest private memory.",
        torch=True,
    ),
    Part(
        "quantization",
        "The quantiser",
        "`edge-phi3 quantize` and the bare call of `llama_model_quantize` in a fresh process; both write the same"
        " tensors. Ours also plans the sizes first, shows progress, and waits until the disk has the file.",
    ),
    Part(
        "tokenizing",
        "Text to tokens and back",
        "Ours, which is llama.cpp's with the rules of Phi-3's added tokens around it, and Hugging Face's `tokenizers`"
        " library, on the demo model's vocabulary; both give the same tokens and the same text. Ours remembers words:"
        " it has seen those of the texts before, except where they are new. A ratio above 1 says how many times as long"
        " the library takes.",
    ),
    Part(
        "generation_kernels",
        "Choosing tokens",
        "What one decode step costs beyond the model, with a vocabulary of 32,064 words and prompts of 512 tokens, as a"
        " multiple of one `argmax` over the same rows: the least of 150 rounds on both sides, on one core. The last"
        " three cases are the same choice for 16 rows through llama.cpp's sampler chain, row by row.",
    ),
)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark of a suite: seconds of a round, and what else it tells."""

    name: str
    median: float
    least: float
    rounds: int
    figures: dict[str, float | str]


class SuiteRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A run of a suite."""

    machine: Machine
    results: list[Entry]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended: its name, seconds, what came of it, and whether its results are missing or miss a bound."""

    part: str
    seconds: float
    what: str
    failed: bool


def measure(part: Part, results: Path) -> Outcome:
    """Run a part to its end, and take its results over."""
    started, machine = time.monotonic(), Machine.here()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "results.json"
        words = (part.script or f"pytest -q benchmarks/test_{part.name}.py --benchmark-json={{output}}").split()
        command = [sys.executable, "-m", *(word.format(output=made) for word in words)]
        print(f"$ {shlex.join(['python', *command[1:]])}", file=sys.stderr, flush=True)
        code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
        # A bound that is missed is a result as well.
        if code not in {0, 1} or not made.exists():
            what, failed = f"failed with exit code {code}; the figures before stay", True
        else:
            data = made.read_bytes()
            _write(results / f"{part.name}.json", data if part.script else _suite_record(data, machine))
            what, failed = ("measured", False) if code == 0 else ("measured; a bound is missed", True)
    return Outcome(part.name, time.monotonic() - started, what, failed)


def _suite_record(data: bytes, machine: Machine) -> bytes:
    """Take what is compared out of pytest-benchmark's JSON."""
    found: dict[str, Any] = msgspec.json.decode(data)
    entries = [
        Entry(
            name=item["extra_info"].pop("case", item["name"]),
            median=item["stats"]["median"],
            least=item["stats"]["min"],
            rounds=item["stats"]["rounds"],
            figures={name: value for name, value in item["extra_info"].items() if value is not None},
        )
        for item in found["benchmarks"]
    ]
    return msgspec.json.encode(SuiteRecord(machine=machine, results=entries))


def _write(path: Path, data: bytes) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_bytes(msgspec.json.format(data, indent=1).rstrip() + b"\n")


def _measure_all(parts: Sequence[Part], results: Path) -> list[Outcome]:
    """Measure one part after another, those that lack a peer left out."""
    missing = ""
    if any(part.peers for part in parts):
        try:
            build_peers()
        except (PeerError, OSError, subprocess.CalledProcessError) as error:
            missing = str(error)
    outcomes = []
    for part in parts:
        if part.peers and missing:
            outcomes.append(Outcome(part.name, 0, f"not measured: {missing}", failed=True))
        elif part.torch and torch_python() is None:
            what = f"not measured: {TORCH_PYTHON} names no interpreter with torch and transformers"
            outcomes.append(Outcome(part.name, 0, what, failed=False))
        else:
            outcomes.append(measure(part, results))
    return outcomes


def main() -> int:
    """Measure, write the page, and print what came of each part."""
    from benchmarks import report  # noqa: PLC0415 - the report is made of this module's table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="PART", help=f"repeatable: {', '.join(names)}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    arguments = parser.parse_args()
    chosen = [part for part in PARTS if arguments.only is None or part.name in arguments.only]
    arguments.results.mkdir(parents=True, exist_ok=True)
    outcomes = _measure_all(chosen, arguments.results)
    report.write(arguments.results, arguments.docs)
    table = Table("part", "seconds", "outcome", box=None)
    for outcome in outcomes:
        table.add_row(outcome.part, f"{outcome.seconds:.0f}", f"[{'red' if outcome.failed else 'green'}]{outcome.what}")
    Console(stderr=True).print(table)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
