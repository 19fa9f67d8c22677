"""Check the request rate that `edge-phi3 bench serve` finds with an independent load generator: wrk.

    apt-get install wrk
    python -m benchmarks.request_rate                # on the demo model
    python -m benchmarks.request_rate --record       # and writes results/request_rate.json

One server, one fixed greedy request of a few tokens on ``POST /chat``, a closed loop of N clients: each tool sends the
same bytes in the body, in alternating turns. They agree when their medians are no further apart than the turns of one
and the same tool are. Exit code 1 when they do not, or when the machine is too noisy to tell. The load generators share
the machine with the server, and each takes its own part of it, which is shown: the shorter the answers, the larger.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.models import CACHE, model_path
from benchmarks.servers import ours
from edge_phi3.bench.http_client import HttpClient
from edge_phi3.bench.load import Level
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.serve import ServeBench, run
from edge_phi3.bench.targets import ChatTarget
from edge_phi3.bench.workload import FileSessions, Workload

RECORD = Path(__file__).parent / "results" / "request_rate.json"
MOST_NOISE = 0.25
"""Turns of one tool that lie further apart, in parts of their median, tell nothing."""

PROMPT = "What does json.dumps do?"

_WRK_SCRIPT = """
init = function(arguments)
  local file = assert(io.open(arguments[1], "rb"))
  wrk.method, wrk.body = "POST", file:read("*a")
  wrk.headers["Content-Type"] = "application/json"
  file:close()
end

done = function(summary)
  local e = summary.errors
  io.stderr:write(string.format('{"requests": %d, "microseconds": %d, "errors": %d}',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class Turn(msgspec.Struct, frozen=True):
    """One turn of one tool.

    Attributes:
        rate: requests per second.
        generator_cores: processor cores that the load generator kept busy.
    """

    rate: float
    generator_cores: float


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Both tools on the same requests.

    Attributes:
        tokens: of each answer.
        bench: turns of `edge-phi3 bench serve`.
        wrk: turns of wrk.
    """

    tokens: int
    bench: list[Turn]
    wrk: list[Turn]

    @property
    def ratio(self) -> float:
        """The median rate of `edge-phi3 bench serve` over that of wrk."""
        return median(self.bench) / median(self.wrk)

    @property
    def noise(self) -> float:
        """How far apart the turns of one and the same tool are, of the tool where that is more."""
        return max(spread(self.bench), spread(self.wrk))

    @property
    def verdict(self) -> str:
        """Whether the medians differ by no more than the turns of one tool do: "yes", "no", or that nobody can tell."""
        if self.noise > MOST_NOISE:
            return "too noisy to tell"
        return "yes" if abs(self.ratio - 1) <= self.noise else "no"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared, where, and how.

    Attributes:
        machine: where.
        command: how.
        clients: of the closed loop.
        seconds: of each turn.
        cases: what was found, for each length of answers.
    """

    machine: Machine
    command: str
    clients: int
    seconds: int
    cases: list[Case]


def median(turns: list[Turn]) -> float:
    """Give the median rate."""
    return statistics.median(turn.rate for turn in turns)


def spread(turns: list[Turn]) -> float:
    """Give how far apart the turns of one tool are: their range over their median."""
    rates = [turn.rate for turn in turns]
    return (max(rates) - min(rates)) / median(turns)


def bench_turn(url: str, prompts: Path, workload: Workload, clients: int, seconds: int) -> Turn:
    """Measure with `edge-phi3 bench serve`."""
    level = Level(clients=clients, duration=seconds)
    (summary,) = run(ServeBench(url, [level], workload, api="chat", prompts=prompts)).levels
    if summary.failed:
        sys.exit(f"{summary.failed} requests of bench serve failed: {next(iter(summary.errors))}")
    return Turn(summary.requests_per_second, summary.generator_cores)


def wrk_turn(url: str, script: Path, body: Path, clients: int, seconds: int) -> Turn:
    """Measure with wrk."""
    options = ["--threads", "1", "--connections", str(clients), "--duration", f"{seconds}s", "--timeout", "60s"]
    before = _cpu_seconds()
    finished = subprocess.run(
        ["wrk", *options, "--script", script, f"{url}{ChatTarget.path}", "--", body],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        sys.exit(f"wrk failed: {finished.stderr or finished.stdout}")
    found = json.loads(finished.stderr)
    if found["errors"]:
        sys.exit(f"{found['errors']} requests of wrk failed:\n{finished.stdout}")
    elapsed = found["microseconds"] / 1e6
    return Turn(found["requests"] / elapsed, (_cpu_seconds() - before) / elapsed)


def _cpu_seconds() -> float:
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def write_inputs(folder: Path, workload: Workload) -> tuple[Path, Path, Path]:
    """Write what the tools read: the prompt for ours; the script and the body, the same bytes as ours, for wrk."""
    prompts, script, body = folder / "prompts.jsonl", folder / "chat.lua", folder / "body.json"
    prompts.write_text(PROMPT, encoding="utf-8")
    ask = FileSessions(prompts, workload)(0).ask([], workload)
    body.write_bytes(msgspec.json.encode(ChatTarget(HttpClient("http://127.0.0.1")).request(ask)))
    script.write_text(_WRK_SCRIPT, encoding="utf-8")
    return prompts, script, body


def compare(url: str, tokens: int, *, clients: int, seconds: int, rounds: int) -> Case:
    """Take turns on a running server; the first turn of each only warms up."""
    workload = Workload(output_tokens=str(tokens), stream=False, ignore_eos=True)
    bench: list[Turn] = []
    wrk: list[Turn] = []
    with tempfile.TemporaryDirectory() as folder:
        prompts, script, body = write_inputs(Path(folder), workload)
        tools: list[tuple[list[Turn], Callable[[int], Turn]]] = [
            (bench, lambda seconds: bench_turn(url, prompts, workload, clients, seconds)),
            (wrk, lambda seconds: wrk_turn(url, script, body, clients, seconds)),
        ]
        for _, turn in tools:
            turn(1)
        for number in range(rounds):
            for turns, turn in tools if number % 2 == 0 else tools[::-1]:
                turns.append(turn(seconds))
            console = Console(stderr=True, soft_wrap=True)
            console.print(f"{tokens} tokens: bench serve {bench[-1].rate:.1f}, wrk {wrk[-1].rate:.1f} requests/s")
    return Case(tokens=tokens, bench=bench, wrk=wrk)


def show(cases: Sequence[Case]) -> Table:
    """Give both rates as a table."""
    heads = ("tokens", "tool", "requests/s", "lowest", "highest", "spread", "own cores", "ratio", "within noise")
    table = Table(*heads, box=None)
    for case in cases:
        for name, turns in (("bench serve", case.bench), ("wrk", case.wrk)):
            rates = [turn.rate for turn in turns]
            figures = (f"{value:.1f}" for value in (median(turns), min(rates), max(rates)))
            cores = statistics.median(turn.generator_cores for turn in turns)
            verdict = ("", "") if turns is case.wrk else (f"{case.ratio:.3f}", case.verdict)
            table.add_row(str(case.tokens), name, *figures, f"{spread(turns):.1%}", f"{cores:.3f}", *verdict)
    return table


def main() -> int:
    """Compare on a server of our own, print, and record."""
    numbers: Callable[[str], Any] = lambda text: [int(part) for part in text.split(",")]  # noqa: E731 - for argparse
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=numbers, default=[4, 32], help="of each answer, with commas")
    parser.add_argument("--seconds", type=int, default=5, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each tool")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=RECORD, help=f"write results/{RECORD.name}, or the file named"
    )
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed; say apt-get install wrk, or take it from github.com/wg/wrk.")
    loop = {"clients": arguments.clients, "seconds": arguments.seconds, "rounds": arguments.rounds}
    options = {"tokens": ",".join(map(str, arguments.tokens)), **loop, "threads": arguments.threads}
    command = ["python -m benchmarks.request_rate --record", *(f"--{name} {value}" for name, value in options.items())]
    machine, model = Machine.here(), model_path("demo", arguments.cache)
    with ours(model, threads=arguments.threads, parallel=arguments.clients, ctx_size=256 * arguments.clients) as url:
        cases = [compare(url, tokens, **loop) for tokens in arguments.tokens]
    Console(width=120).print(show(cases))
    if arguments.record:
        record = Record(
            machine=machine,
            command=" ".join(command),
            clients=arguments.clients,
            seconds=arguments.seconds,
            cases=cases,
        )
        arguments.record.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return int(not all(case.verdict == "yes" for case in cases))


if __name__ == "__main__":
    sys.exit(main())
