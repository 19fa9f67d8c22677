"""Our server against llama-server, llama-bench and transformers: the same model, threads and requests, turn by turn.

    python -m benchmarks.engine_ratios                          # everything but transformers
    python -m benchmarks.engine_ratios --parts throughput --models 0.65b --clients 1,16 --rounds 9

Both servers run at the same time, llama-server on the same libraries of llama.cpp (see `tests.support.peers`); one is
asked while the other idles, and the turns alternate, so that a slow minute of the machine hits both. What counts is the
median of the ratios of neighbouring turns. A shared machine's speed changes within seconds, by more than what is
compared: where few clients make a turn short there are more of them. The load generator shares the machine with both.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import uvloop

from benchmarks.servers import llama_server, original, ours
from edge_phi3.bench.endpoints import HttpClient
from edge_phi3.bench.load import Level, Summary
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.serve import ServeBench, measure
from edge_phi3.bench.workload import Workload
from tests.support.models import SHAPES, model_path, random_checkpoint
from tests.support.peers import build_peers, torch_python

_WORKLOADS = {
    "greedy": Workload(),
    "sampled": Workload(temperature=1.0, top_k=10),
    "greedy-plain": Workload(stream=False),
    "sampled-plain": Workload(stream=False, temperature=1.0, top_k=10),
}
"""What is asked: answers are streamed, token by token, unless they are plain."""

_CELLS_PER_CLIENT = 256
_PARTS = ("throughput", "stream", "health", "original")


class Result(msgspec.Struct, kw_only=True):
    """One comparison.

    Attributes:
        part: what was compared.
        model: on which model.
        case: clients and mode, or what else.
        ours: our median.
        theirs: the peer's median.
        unit: of both.
        ratio: median of the turns' ratios, above 1 when ours is better.
        low: the smallest of them.
        high: the largest.
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
    load: float
    turns: list[tuple[float, float]]


class Record(msgspec.Struct):
    """What one run of this script found, and where."""

    machine: Machine
    results: list[Result]


def compare(
    part: str,
    model: str,
    case: str,
    turns: Sequence[tuple[float, float]],
    *,
    unit: str,
    better: Literal["high", "low"] = "high",
) -> Result:
    """Make a result of pairs (ours, theirs); `better` says which way is better."""
    ratios = [(mine / other) ** (1 if better == "high" else -1) for mine, other in turns]
    return Result(
        part=part,
        model=model,
        case=case,
        ours=statistics.median(mine for mine, _ in turns),
        theirs=statistics.median(other for _, other in turns),
        unit=unit,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        load=round(os.getloadavg()[0], 2),
        turns=list(turns),
    )


class Bench:
    """One model, and the servers that run it."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.arguments = arguments
        self.model = model_path(name)
        self.options = {"threads": arguments.threads, "parallel": 16, "ctx_size": 16 * _CELLS_PER_CLIENT}
        self.turn = 0

    async def load(
        self, url: str, api: str, workload: Workload, level: Level, done: Callable[[int], None] = lambda _: None
    ) -> Summary:
        """Put load on a server. In each turn both get the same prompts, which nobody has cached."""
        bench = ServeBench(url, [level], msgspec.structs.replace(workload, seed=self.turn), api=api)
        (summary,) = (await measure(bench, done)).levels
        if summary.failed:
            sys.exit(f"{url}: {summary.failed} requests failed: {next(iter(summary.errors))}")
        return summary

    async def throughput(self) -> AsyncIterator[Result]:
        """Tokens per second over llama-server's, for each mode and number of clients."""
        with (
            ours(self.model, **self.options, options=self.arguments.ours) as our_url,
            llama_server(build_peers(), self.model, **self.options, options=self.arguments.llama_server) as their_url,
        ):
            for mode in self.arguments.modes:
                for clients in self.arguments.clients:
                    level = Level(clients=clients, sessions=max(self.arguments.requests, 2 * clients), warmup=1)
                    servers = {"chat": our_url, "llama-server": their_url}
                    turns = await self._alternate(servers, _WORKLOADS[mode], level, self._turns(clients))
                    yield compare("throughput", self.name, f"{clients} clients, {mode}", turns, unit="tokens/s")

    def _turns(self, clients: int) -> int:
        """Return how many turns each server has: about as many requests in all, however many clients ask."""
        return int(self.arguments.rounds) * max(1, 8 // clients)

    async def _alternate(
        self, servers: dict[str, str], workload: Workload, level: Level, count: int, *, theirs: str = "llama-server"
    ) -> list[tuple[float, float]]:
        """Ask both servers in turns, each going first in every other one; return tokens per second."""
        turns = []
        for number in range(count):
            self.turn += 1
            found: dict[str, float] = {}
            for name in list(servers) if number % 2 == 0 else reversed(servers):
                api = "chat" if name == "transformers" else name
                found[name] = (await self.load(servers[name], api, workload, level)).tokens_per_second
            turns.append((found["chat"], found[theirs]))
        return turns

    async def original(self) -> AsyncIterator[Result]:
        """Tokens per second over transformers' (bfloat16, one generation at a time), at 1 client and at the most."""
        python = torch_python()
        if python is None:
            sys.exit("The part original needs an interpreter with transformers; name one in TORCH_PYTHON.")
        with (
            random_checkpoint(self.name) as checkpoint,
            ours(self.model, **self.options) as our_url,
            original(python, checkpoint, threads=self.arguments.threads) as their_url,
        ):
            servers = {"chat": our_url, "transformers": their_url}
            for clients in sorted({1, max(self.arguments.clients)}):
                level = Level(clients=clients, sessions=max(4, clients), warmup=1)
                turns = await self._alternate(
                    servers, _WORKLOADS["greedy-plain"], level, self.arguments.rounds, theirs="transformers"
                )
                yield compare("transformers", self.name, f"{clients} clients, greedy", turns, unit="tokens/s")

    async def stream(self) -> AsyncIterator[Result]:
        """Tokens per second of one stream while it decodes, over llama-bench's at the same depth."""
        level, turns = Level(clients=1, sessions=self.arguments.requests, warmup=1), []
        with ours(self.model, **self.options) as url:
            for _ in range(self._turns(1)):
                self.turn += 1
                times = (await self.load(url, "chat", Workload(), level)).per_token
                assert times is not None
                output = build_peers().run(
                    "llama-bench", "-m", self.model, "-t", str(self.arguments.threads), "-p", "0", "-n", "64",
                    "-d", "64", "-r", str(self.arguments.requests), "-o", "json",
                )  # fmt: skip
                turns.append((1 / times.p50, statistics.median(json.loads(output)[0]["samples_ts"])))
        yield compare("one stream", self.name, "HTTP over llama-bench", turns, unit="tokens/s")

    async def health(self) -> AsyncIterator[Result]:
        """The 99th percentile of /healthz under 16 clients, beside llama-server's /health."""
        turns = []
        with (
            ours(self.model, **self.options) as our_url,
            llama_server(build_peers(), self.model, **self.options) as their_url,
        ):
            for _ in range(self.arguments.rounds):
                self.turn += 1
                mine = await self._probe(our_url, "chat", "/healthz")
                turns.append((mine, await self._probe(their_url, "llama-server", "/health")))
        yield compare("health", self.name, "p99 under 16 clients", turns, unit="ms", better="low")

    async def _probe(self, url: str, api: str, path: str) -> float:
        """Ask for a path every 10 ms while 16 clients generate; return the 99th percentile in milliseconds."""
        busy, level = asyncio.Event(), Level(clients=16, sessions=16 * 4, warmup=1)
        load = asyncio.create_task(self.load(url, api, Workload(), level, lambda _: busy.set()))
        load.add_done_callback(lambda _: busy.set())
        client, times = HttpClient(url), []
        await busy.wait()
        try:
            while not load.done():
                started = time.perf_counter()
                await client.exchange("GET", path, None, lambda _: None)
                times.append(time.perf_counter() - started)
                await asyncio.sleep(0.010)
        finally:
            await client.close()
        await load
        return float(np.percentile(times, 99)) * 1e3


async def run(arguments: argparse.Namespace) -> list[Result]:
    """Run the parts that are asked for, and print a line for each comparison."""
    results: list[Result] = []
    for name in arguments.models:
        bench = Bench(name, arguments)
        for part in arguments.parts:
            async for result in getattr(bench, part)():
                results.append(result)
                print(
                    f"{result.part}, {result.model}, {result.case}: {result.ours:.1f} and {result.theirs:.1f}"
                    f" {result.unit}, ratio {result.ratio:.2f} ({result.low:.2f} to {result.high:.2f}),"
                    f" load {result.load:g}",
                    flush=True,
                )
    return results


def _names(*allowed: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(allowed)}")
        return text.split(",")

    return parse


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Compare, and print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_names(*_PARTS), default=list(_PARTS[:-1]), help=", ".join(_PARTS))
    parser.add_argument("--models", type=_names(*SHAPES, "demo"), default=["0.65b"], help=", ".join(SHAPES))
    parser.add_argument("--clients", type=_numbers, default=[1, 4, 8, 16])
    parser.add_argument("--modes", type=_names(*_WORKLOADS), default=["greedy", "sampled"], help=", ".join(_WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server; with 1 client eight times as many")
    parser.add_argument("--requests", type=int, default=8, help="requests of a turn, at least 2 for each client")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ours", type=_words, default=[], help="more options for our server in the part throughput")
    parser.add_argument("--llama-server", type=_words, default=[], help="more options for llama-server, with commas")
    parser.add_argument("--output", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    machine = Machine.here()

    results = uvloop.run(run(arguments))
    if arguments.output:  # whole or not at all: a run that fails halfway leaves nothing
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(Record(machine, results)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
