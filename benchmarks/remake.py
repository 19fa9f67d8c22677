"""Measure everything that docs/benchmarks.md shows again, and write the page anew; under 30 minutes on two cores.

    python -m benchmarks.remake                                       # or: make measure
    python -m benchmarks.remake --only quantizations --only tokenizing
    python -m benchmarks.remake --torch-python torch/bin/python       # what is compared with transformers as well

Each part is one of the scripts of this folder, in a process of its own, one after another. Its results take the place
of those before only when it has measured to its end, so that a part that fails leaves its older figures, with their
date, in the page. Exit code 1 when a part failed.

Building llama.cpp's programs the first time (the part "peers") takes as long again and is not in the 30 minutes. Parts
that would take too long at the scripts' own defaults run in a smaller setting, which stands in `PARTS` here and in the
page above each table.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import report
from benchmarks.engine_ratios import Record as EngineRecord
from benchmarks.models import CACHE
from benchmarks.peers import build_peers
from edge_phi3.files import atomic_output

_ENGINE = "engine.json"


@dataclass(frozen=True, slots=True)
class Part:
    """One script with its options.

    Attributes:
        name: what ``--only`` calls it.
        options: module and options; ``{output}``, ``{cache}`` and ``{torch}`` stand for paths.
        file: of the results that it makes; None when it only makes ready.
        peers: whether it needs llama.cpp's programs.
        torch: whether it needs an interpreter with torch and transformers.
    """

    name: str
    options: str
    file: str | None
    peers: bool = False
    torch: bool = False


def _suite(name: str, *, torch: bool = False) -> Part:
    return Part(name, f"benchmarks.record {name} --output {{output}}", f"{name}.json", peers=torch, torch=torch)


PEERS = Part("peers", "benchmarks.peers --cache {cache}", None)

_RATIOS = "benchmarks.engine_ratios --cache {cache} --json {output}"

PARTS = (
    # One thread: threads that wait for each other would measure how busy the machine is.
    Part(
        "quantizations", "benchmarks.quantizations --repetitions 3 --threads 1 --output {output}", "quantizations.json"
    ),
    # 4 chunks of 512 tokens agree or differ as plainly as all of the text.
    Part(
        "perplexity_parity",
        "benchmarks.perplexity_parity --cache {cache} --chunks 4 --threads 1 --record {output}",
        "perplexity_parity.json",
        peers=True,
    ),
    Part(
        "engine",
        f"{_RATIOS} --models 0.65b --rounds 3 --requests 2 --parts throughput,stream,prefix,health",
        _ENGINE,
        peers=True,
    ),
    Part(
        "transformers",
        f"{_RATIOS} --models 18m --rounds 3 --clients 1,4 --parts original --torch-python {{torch}}",
        _ENGINE,
        peers=True,
        torch=True,
    ),
    Part("request_rate", "benchmarks.request_rate --cache {cache} --record {output}", "request_rate.json"),
    Part(
        "window_chunk",
        "benchmarks.window_chunk --cache {cache} --models demo --prompts 2 --chunks 1,8,16,32,64,128,512,0"
        " --threads 1 --json {output}",
        "window_chunk.json",
    ),
    Part("fit_parity", "benchmarks.fit_parity --cache {cache} --record {output}", "fit_parity.json"),
    _suite("conversion", torch=True),
    _suite("quantization"),
    _suite("generation_kernels"),
    _suite("tokenizing"),
    _suite("prefix_cache"),
    _suite("http_overhead"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended.

    Attributes:
        part: its name.
        seconds: how long it took.
        what: in words.
        failed: whether its results are missing or disagree.
    """

    part: str
    seconds: float
    what: str
    failed: bool


class Remake:
    """A run of several parts.

    Args:
        results: the folder of results.
        cache: where models and peers are kept.
        torch: an interpreter with torch and transformers, or None.
        console: where progress is shown.
    """

    def __init__(self, results: Path, cache: Path, torch: Path | None, console: Console) -> None:
        self._results = results
        self._cache = cache
        self._torch = torch
        self._console = console

    def run(self, part: Part) -> Outcome:
        """Run a part to its end, show what it says, and take its results over."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "results.json"
            code, said = self._process(part, made, Path(folder) / "stdout")
            what, failed = self._judge(part, code, said=said, made=made)
        return Outcome(part.name, time.monotonic() - started, what, failed)

    def _process(self, part: Part, made: Path, stdout: Path) -> tuple[int, str]:
        """Run the script; give its exit code and what it wrote to stdout, which is shown once it has ended."""
        paths = {"output": made, "cache": self._cache, "torch": self._torch}
        command = [sys.executable, "-m", *(word.format(**paths) for word in part.options.split())]
        self._say(f"$ {shlex.join(['python', *command[1:]])}")
        environment = os.environ.copy()
        if part.torch:
            environment |= {
                "LLAMA_CPP_SOURCE": str(build_peers(self._cache).source),
                "TORCH_PYTHON": str(self._torch),
            }
        with (
            stdout.open("wb") as out,
            subprocess.Popen(
                command,
                cwd=report.ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            ) as process,
        ):
            assert process.stderr is not None
            for line in process.stderr:
                self._say(line.rstrip("\n"))
        said = stdout.read_text("utf-8", errors="replace").rstrip("\n")
        self._say(said)
        return process.returncode, said

    def _judge(self, part: Part, code: int, *, said: str, made: Path) -> tuple[str, bool]:
        """Take results over when the part has measured to its end, whatever they say."""
        if part.file is None:
            return ("done", False) if code == 0 else (f"failed with exit code {code}", True)
        # The scripts write their results last, but for the engine's, which ends with a table.
        whole = made.exists() and code in {0, 1} and (part.file != _ENGINE or said != "")
        if not whole:
            return f"failed with exit code {code}; the figures before stay", True
        self._take_over(part.file, made)
        if code == 0:
            return "measured", False
        # The engine's goals are wishes, and missing one is a result; the other scripts' bounds are kept.
        if part.file == _ENGINE:
            return "measured; goals are missed", False
        return "measured; a bound is missed, or figures do not agree", True

    def _take_over(self, name: str, made: Path) -> None:
        target, data = self._results / name, made.read_bytes()
        if name == _ENGINE and target.exists():
            new = msgspec.json.decode(data, type=list[EngineRecord])
            old = msgspec.json.decode(target.read_bytes(), type=list[EngineRecord])
            data = msgspec.json.format(msgspec.json.encode(without_repeated(old, new) + new))
        with atomic_output(target, force=True) as temporary:
            temporary.write_bytes(data.rstrip() + b"\n")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def without_repeated(old: Sequence[EngineRecord], new: Sequence[EngineRecord]) -> list[EngineRecord]:
    """Give the older records of the engine without what was measured anew: the same part on the same model."""
    measured = {(result.part, result.model) for record in new for result in record.results}
    left = [
        msgspec.structs.replace(
            record, results=[result for result in record.results if (result.part, result.model) not in measured]
        )
        for record in old
    ]
    return [record for record in left if record.results]


def show(outcomes: Sequence[Outcome]) -> Table:
    """Give what came of each part as a table."""
    table = Table("part", "seconds", "outcome", box=None)
    for outcome in outcomes:
        color = "red" if outcome.failed else "green"
        table.add_row(outcome.part, f"{outcome.seconds:.0f}", f"[{color}]{outcome.what}[/]")
    table.add_row("all", f"{sum(outcome.seconds for outcome in outcomes):.0f}", "")
    return table


def main() -> int:
    """Run the parts, write the page, and tell what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="PART", help=f"repeatable: {', '.join(names)}"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models and peers are kept")
    parser.add_argument("--torch-python", type=Path, help="an interpreter with torch and transformers; without it what"
                        f" needs them is left out: {', '.join(part.name for part in PARTS if part.torch)}")  # fmt: skip
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, default=report.DOCS, help="folder of the page")
    arguments = parser.parse_args()
    chosen = [part for part in PARTS if arguments.only is None or part.name in arguments.only]
    possible = [part for part in chosen if arguments.torch_python is not None or not part.torch]
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    arguments.results.mkdir(parents=True, exist_ok=True)
    cache, results = arguments.cache.resolve(), arguments.results.resolve()
    torch = None if arguments.torch_python is None else arguments.torch_python.absolute()  # a link tells its venv
    remake = Remake(results, cache, torch, console)
    outcomes: list[Outcome] = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(possible))
        for part in [*([PEERS] if any(part.peers for part in possible) else []), *possible]:
            progress.update(bar, description=part.name)
            if part.peers and outcomes[0].failed:
                outcomes.append(Outcome(part.name, 0, "not measured: llama.cpp's programs are missing", failed=True))
            else:
                outcomes.append(remake.run(part))
            console.print(f"{part.name}: {outcomes[-1].what}, {outcomes[-1].seconds:.0f} s")
            progress.advance(bar, int(part is not PEERS))
    report.write(results, arguments.docs)
    console.print(show(outcomes))
    for part in chosen:
        if part not in possible:
            console.print(
                f"{part.name} was not measured: --torch-python names an interpreter with torch and transformers."
            )
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
