"""Our server against llama-server and llama-bench: the same GGUF, threads, cells and requests, turn by turn.

    python -m benchmarks.engine_ratios                          # everything, on both models
    python -m benchmarks.engine_ratios --parts throughput --models 0.65b --clients 1,16 --rounds 9

Both servers run on the same libraries of llama.cpp (see `benchmarks.peers`) at the same time; one is asked while the
other idles, and the turns alternate, so that a slow minute of the machine hits both. What counts is the median of the
ratios of neighbouring turns. A shared machine's speed changes within seconds, by more than what is compared: where few
clients make a turn short there are more of them. The load generator shares the machine with both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import peers as llama_cpp
from benchmarks.models import model_path, random_checkpoint
from benchmarks.servers import llama_server, original, ours
from edge_phi3.bench.http_client import HttpClient
from edge_phi3.bench.load import Level, run_level
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.summary import Summary, per_token, summarise
from edge_phi3.bench.targets import Target, open_target
from edge_phi3.bench.workload import RandomSessions, Ruler, Workload, measure_ruler

_WORKLOADS = {
    "greedy": Workload(),
    "sampled": Workload(temperature=1.0, top_k=10),
    "greedy-plain": Workload(stream=False),
    "sampled-plain": Workload(stream=False, temperature=1.0, top_k=10),
}
"""What is asked: answers are streamed, token by token, unless they are plain."""

_CELLS_PER_CLIENT = 256

GOALS: dict[str, dict[int, float]] = {
    "0.65b": {1: 1.0, 4: 1.0, 8: 1.0, 16: 1.0},
}
"""The throughput over llama-server's that is wanted at each number of clients."""

STREAM_GOALS = {"0.65b": 0.97}
PREFIX_GOAL = 5.0
HEALTH_GOAL = 0.020


class Result(msgspec.Struct, kw_only=True):
    """One comparison.

    Attributes:
        part: what was compared.
        model: on which model.
        case: clients and mode, or what else.
        ours: our median.
        theirs: the peer's median, or that without the thing compared.
        unit: of both.
        ratio: median of the turns' ratios, above 1 when ours is better.
        low: the smallest of them.
        high: the largest.
        goal: the ratio (or our value) that is wanted, or None.
        met: whether it is reached, or None without a goal.
        load: mean number of busy processes over the last minute, at the end.
        turns: both values of each turn.
    """

    part: str
    model: str
    case: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    low: float
    high: float
    goal: float | None
    met: bool | None
    load: float
    turns: list[tuple[float, float]]


class Record(msgspec.Struct):
    """What one run of this script found.

    Attributes:
        machine: where.
        command: its options, less those that name folders of the machine.
        results: what was compared.
    """

    machine: Machine
    command: list[str]
    results: list[Result]


def public_options(options: Sequence[str]) -> list[str]:
    """Leave out options that name folders of one machine."""
    kept: list[str] = []
    skip = False
    for option in options:
        private = re.match(r"--(cache|source|json|torch-python)(=|$)", option)
        if not skip and not private:
            kept.append(option)
        skip = not skip and private is not None and "=" not in option
    return kept


def write(path: Path, record: Record) -> None:
    """Put a record into a file of records, in the place of one that the same options made."""
    records = msgspec.json.decode(path.read_bytes(), type=list[Record]) if path.exists() else []
    records = [*(other for other in records if other.command != record.command), record]
    path.write_bytes(msgspec.json.format(msgspec.json.encode(records)))


def compare(part: str, model: str, case: str, turns: Sequence[tuple[float, float]], **more: Any) -> Result:
    """Make a result of pairs (ours, theirs); `better` "high" or "low" says which way is better."""
    sign = 1 if more.pop("better", "high") == "high" else -1
    ratios = [(mine / other) ** sign for mine, other in turns]
    goal, ratio = more.get("goal"), statistics.median(ratios)
    return Result(
        part=part,
        model=model,
        case=case,
        ours=statistics.median(mine for mine, _ in turns),
        theirs=statistics.median(other for _, other in turns),
        unit=more["unit"],
        ratio=ratio,
        low=min(ratios),
        high=max(ratios),
        goal=goal,
        met=None if goal is None else ratio >= goal,
        load=round(os.getloadavg()[0], 2),
        turns=list(turns),
    )


@contextlib.asynccontextmanager
async def connected(url: str, api: str) -> AsyncIterator[tuple[Target, Ruler]]:
    """Give an endpoint and how it counts tokens."""
    client = HttpClient(url)
    try:
        target = await open_target(client, api)
        yield target, await measure_ruler(target)
    finally:
        client.close()


class Bench:
    """One model, and the servers that run it."""

    def __init__(self, name: str, arguments: argparse.Namespace, built: llama_cpp.Peers) -> None:
        self.name = name
        self.arguments = arguments
        self.peers = built
        self.model = model_path(name, arguments.cache)
        self.options = {"threads": arguments.threads, "parallel": 16, "ctx_size": 16 * _CELLS_PER_CLIENT}
        self.next_session = 0

    async def level(self, target: Target, ruler: Ruler, workload: Workload, level: Level) -> Summary:
        """Run a level on one server. Calls in one turn ask the same; `turn_done` moves on to new prompts."""
        sessions = RandomSessions(workload, ruler)
        run = await run_level(target, sessions, workload, level, first_session=self.next_session)
        summary = summarise(run)
        if summary.failed:
            sys.exit(f"{target.client.url}: {summary.failed} requests failed: {next(iter(summary.errors))}")
        return summary

    def turn_done(self) -> None:
        """Ask for other prompts from now on, which nobody has cached: warm-ups count from a million on."""
        self.next_session += 10_000_000

    async def throughput(self) -> AsyncIterator[Result]:
        """Tokens per second over llama-server's, for each mode and number of clients."""
        with (
            ours(self.model, **self.options, options=self.arguments.ours) as our_url,
            llama_server(self.peers, self.model, **self.options, options=self.arguments.llama_server) as their_url,
        ):
            async with connected(our_url, "chat") as mine, connected(their_url, "llama-server") as theirs:
                for mode in self.arguments.modes:
                    workload = _WORKLOADS[mode]
                    for clients in self.arguments.clients:
                        level = Level(clients=clients, sessions=max(self.arguments.requests, 2 * clients), warmup=1)
                        turns = await self._alternate(mine, theirs, workload, level, self._turns(clients))
                        goal = GOALS.get(self.name, {}).get(clients)
                        case = f"{clients} clients, {mode}"
                        yield compare("throughput", self.name, case, turns, unit="tokens/s", goal=goal)

    def _turns(self, clients: int) -> int:
        """Say how many turns each server has: about as many requests in all, however many clients ask."""
        return int(self.arguments.rounds) * max(1, 8 // clients)

    async def _alternate(
        self, mine: tuple[Target, Ruler], theirs: tuple[Target, Ruler], workload: Workload, level: Level, count: int
    ) -> list[tuple[float, float]]:
        turns = []
        for number in range(count):
            found: dict[int, Summary] = {}
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                found[which] = await self.level(*(mine, theirs)[which], workload, level)
            self.turn_done()
            turns.append((found[0].tokens_per_second, found[1].tokens_per_second))
        return turns

    async def original(self) -> AsyncIterator[Result]:
        """Tokens per second over transformers' (bfloat16, one generation at a time), at 1 client and at the most."""
        if self.arguments.torch_python is None:
            print("original: not measured; --torch-python names an interpreter with transformers", file=sys.stderr)
            return
        with (
            random_checkpoint(self.name) as checkpoint,
            ours(self.model, **self.options) as our_url,
            original(self.arguments.torch_python, checkpoint, threads=self.arguments.threads) as their_url,
        ):
            async with connected(our_url, "chat") as mine, connected(their_url, "chat") as theirs:
                workload = _WORKLOADS["greedy-plain"]
                for clients in sorted({1, max(self.arguments.clients)}):
                    level = Level(clients=clients, sessions=max(4, clients), warmup=1)
                    turns = await self._alternate(mine, theirs, workload, level, self.arguments.rounds)
                    yield compare("transformers", self.name, f"{clients} clients, greedy", turns, unit="tokens/s")

    async def stream(self) -> AsyncIterator[Result]:
        """Tokens per second of one stream while it decodes, over llama-bench's at the same depth."""
        workload, turns = Workload(), []
        with ours(self.model, **self.options) as url:
            async with connected(url, "chat") as (target, ruler):
                for _ in range(self._turns(1)):
                    sessions = RandomSessions(workload, ruler)
                    level = Level(clients=1, sessions=self.arguments.requests, warmup=1)
                    run = await run_level(target, sessions, workload, level, first_session=self.next_session)
                    self.turn_done()
                    times = [seconds for record in run.records if (seconds := per_token(record)) is not None]
                    turns.append((1 / statistics.median(times), self._llama_bench()))
        goal = STREAM_GOALS.get(self.name)
        yield compare("one stream", self.name, "HTTP over llama-bench", turns, unit="tokens/s", goal=goal)

    def _llama_bench(self) -> float:
        output = self.peers.run(
            "llama-bench", "-m", self.model, "-t", str(self.arguments.threads), "-p", "0", "-n", "64", "-d", "64",
            "-r", str(self.arguments.requests), "-o", "json",
        )  # fmt: skip
        return statistics.median(json.loads(output)[0]["samples_ts"])

    async def prefix(self) -> AsyncIterator[Result]:
        """Time to the first token behind 1,000 shared tokens, with the prefix cache and without."""
        workload = Workload(shared_prefix=1000, prompt_tokens="24", output_tokens="4")
        level, turns = Level(clients=1, sessions=2 * self.arguments.requests, warmup=1), []
        with (
            ours(self.model, **self.options) as warm,
            ours(self.model, **self.options, options=["--no-prefix-cache"]) as cold,
        ):
            async with connected(warm, "chat") as with_cache, connected(cold, "chat") as without:
                for number in range(self.arguments.rounds):
                    found: dict[int, float] = {}
                    for which in (0, 1) if number % 2 == 0 else (1, 0):
                        times = (await self.level(*(with_cache, without)[which], workload, level)).first_token
                        assert times is not None
                        found[which] = times.p50 * 1e3
                    self.turn_done()
                    turns.append((found[0], found[1]))
        case = "TTFT, cache over none"
        yield compare("1,000-token prefix", self.name, case, turns, unit="ms", goal=PREFIX_GOAL, better="low")

    async def health(self) -> AsyncIterator[Result]:
        """The 99th percentile of /healthz under 16 clients, beside llama-server's /health."""
        turns: list[tuple[float, float]] = []
        with (
            ours(self.model, **self.options) as our_url,
            llama_server(self.peers, self.model, **self.options) as their_url,
        ):
            async with connected(our_url, "chat") as mine, connected(their_url, "llama-server") as theirs:
                for _ in range(self.arguments.rounds):
                    found = [
                        await self._probe(mine, our_url, "/healthz"),
                        await self._probe(theirs, their_url, "/health"),
                    ]
                    self.turn_done()
                    turns.append((found[0], found[1]))
        result = compare("health", self.name, "p99 under 16 clients", turns, unit="ms", better="low")
        result.goal, result.met = HEALTH_GOAL * 1e3, result.ours <= HEALTH_GOAL * 1e3
        yield result

    async def _probe(self, server: tuple[Target, Ruler], url: str, path: str) -> float:
        """Ask for a path every 10 ms while 16 clients generate; give the 99th percentile in milliseconds."""
        level = Level(clients=16, sessions=16 * 4, warmup=1)
        load = asyncio.create_task(self.level(*server, Workload(), level))
        client, times = HttpClient(url), []
        try:
            while not load.done():
                started = time.perf_counter()
                await client.get(path)
                times.append(time.perf_counter() - started)
                await asyncio.sleep(0.010)
        finally:
            client.close()
        await load
        return float(np.percentile(times, 99)) * 1e3


def show(results: Sequence[Result]) -> Table:
    """Give the results as a table."""
    table = Table(box=None)
    for heading in ("part", "model", "case"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ours", "theirs", "unit", "ratio", "min", "max", "goal", "met", "load"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.part,
            result.model,
            result.case,
            f"{result.ours:.1f}",
            f"{result.theirs:.1f}",
            result.unit,
            f"{result.ratio:.2f}",
            f"{result.low:.2f}",
            f"{result.high:.2f}",
            "-" if result.goal is None else f"{result.goal:g}",
            {None: "", True: "yes", False: "[red]no"}[result.met],
            f"{result.load:g}",
        )
    return table


async def run(arguments: argparse.Namespace, done: Callable[[list[Result]], None]) -> list[Result]:
    """Run the parts that are asked for; `done` is told of the results so far after each."""
    built = llama_cpp.build_peers(arguments.cache, arguments.source)
    results: list[Result] = []
    for name in arguments.models:
        bench = Bench(name, arguments, built)
        for part in arguments.parts:
            async for result in getattr(bench, part)():
                results.append(result)
                done(results)
    return results


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Compare, print a table, and give exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    llama_cpp.add_arguments(parser)
    parser.add_argument("--parts", type=_words, default=["throughput", "stream", "prefix", "health", "original"])
    parser.add_argument("--models", type=_words, default=list(GOALS))
    parser.add_argument("--clients", type=_numbers, default=[1, 4, 8, 16])
    parser.add_argument("--modes", type=_words, default=["greedy", "sampled"], help=", ".join(_WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server; with 1 client eight times as many")
    parser.add_argument("--requests", type=int, default=8, help="requests of a turn, at least 2 for each client")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--torch-python", type=Path, help="an interpreter with transformers, for the part original")
    parser.add_argument("--ours", type=_words, default=[], help="more options for our server in the part throughput")
    parser.add_argument("--llama-server", type=_words, default=[], help="more options for llama-server, with commas")
    parser.add_argument("--json", type=Path, help="keep the results here, beside those of other options")
    arguments = parser.parse_args()
    machine, console = Machine.here(), Console(stderr=True, soft_wrap=True)

    def done(results: list[Result]) -> None:
        last = results[-1]
        console.print(
            f"{last.part}, {last.model}, {last.case}: {last.ours:.1f} and {last.theirs:.1f} {last.unit}, "
            f"ratio {last.ratio:.2f} ({last.low:.2f} to {last.high:.2f}), load {last.load:g}"
        )
        if arguments.json:
            write(arguments.json, Record(machine, public_options(sys.argv[1:]), results))

    results = uvloop.run(run(arguments, done))
    print(msgspec.json.encode(machine).decode())
    Console(width=130).print(show(results))
    return int(any(result.met is False for result in results))


if __name__ == "__main__":
    sys.exit(main())
