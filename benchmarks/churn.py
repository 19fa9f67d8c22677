"""Thousands of requests of every kind through one engine, a third of them cancelled: nothing may leak.

    python -m benchmarks.churn                  # 5,000 requests on a small random model
    python -m benchmarks.churn --requests 500 --sliding-window

Requests come in random sizes and modes (greedy, sampling, several sequences, beams), many beginning alike, into a KV
cache that is too small for all of them, so that the scheduler preempts, beside a prefix store of one MiB, so that it
drops. While they run, and at rest after every tenth part, the engine's books are checked against themselves and against
the positions that llama.cpp holds for every sequence. The process's memory is sampled at rest: from the first fifth to
the end it must not grow by more than --tolerance.
"""

from __future__ import annotations

import argparse
import heapq
import queue
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.model_runner import ModelRunner
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest, RunningRequest
from edge_phi3.generation.config import GenerationConfig
from tests.golden.checkpoints import write_checkpoint

_FIRST_TOKEN, _LAST_TOKEN = 259, 500
_IN_FLIGHT = 48
_LEAVES_WITHIN = 600
"""Events, over all requests, after which the last of those who leave has left: in the queue, during the prompt, or
after some tokens."""


class Audit:
    """Compares three records of the KV cache: cells, sequences, and llama.cpp's own positions."""

    def __init__(self) -> None:
        self.checks = 0

    def __call__(self, runner: ModelRunner) -> None:
        """Check one context; between the engine's steps, or from its thread.

        Raises:
            AssertionError: two records differ.
        """
        runner.kv.audit()
        self.checks += 1

    def at_rest(self, runner: ModelRunner) -> None:
        """Check a context without running requests: every sequence and every cell is free."""
        self(runner)
        assert not runner.running, "a request still runs"
        taken = runner.kv.sequences - runner.kv.free_sequences
        assert taken == runner.kv.used == 0, f"{taken} sequences and {runner.kv.used} cells are taken"


class Churn:
    """Requests sent, cancelled and counted."""

    def __init__(self, engine: Engine, seed: int, longest: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.audit = Audit()
        self._engine = engine
        self._random = np.random.default_rng(seed)
        self._longest = longest
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._flying: dict[int, RunningRequest] = {}
        self._leaving: list[tuple[int, int]] = []
        self._heard = 0
        self._heads = [self._tokens(longest // 2) for _ in range(8)]
        self._next = 0
        self._failure: AssertionError | None = None

    def run(self, count: int) -> None:
        """Send `count` requests, and wait until all have ended."""
        last = self._next + count
        while self._next < last or self._flying:
            while self._next < last and len(self._flying) < _IN_FLIGHT:
                self._send()
            self._handle(*self._events.get(timeout=120))
            if self._failure is not None:
                raise self._failure
        self._wait_for_the_cancelled()
        for runner in self._engine.model.runners:
            self.audit.at_rest(runner)

    def _wait_for_the_cancelled(self) -> None:
        end = time.monotonic() + 60
        while (stats := self._engine.stats()).running or stats.waiting:
            assert time.monotonic() < end, "cancelled requests still run after a minute"
            time.sleep(0.005)
        time.sleep(0.05)

    def _tokens(self, count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return self._random.integers(_FIRST_TOKEN, _LAST_TOKEN, count, dtype=np.int32)

    def _send(self) -> None:
        random, number = self._random, self._next
        self._next += 1
        head = self._heads[int(random.integers(8))][: int(random.integers(0, self._longest // 2))]
        prompt = np.concatenate([head, self._tokens(int(random.integers(1, self._longest // 2)))])
        # Those who leave ask for long answers, so that few of them have theirs before they go.
        leaves = random.random() < 1 / 3
        new_tokens = 64 if leaves else int(random.integers(1, 49))
        config = GenerationConfig.resolve(
            self._mode() | {"max_new_tokens": new_tokens, "max_length": None}, self._engine.model.defaults
        )
        request = GenerationRequest(prompt, config, stream=True)
        running = self._engine.submit(request, lambda event: self._receive(number, event))
        self._flying[number] = running
        if leaves:
            heapq.heappush(self._leaving, (self._heard + int(random.integers(0, _LEAVES_WITHIN)), number))

    def _mode(self) -> dict[str, object]:
        kind = self._random.random()
        if kind < 0.4:
            return {"do_sample": False}
        if kind < 0.7:
            return {"do_sample": True, "top_k": 10, "seed": int(self._random.integers(2**31))}
        if kind < 0.85:
            return {"do_sample": True, "num_return_sequences": int(self._random.integers(2, 5))}
        return {"do_sample": False, "num_beams": int(self._random.integers(2, 5))}

    def _receive(self, number: int, event: Event) -> None:
        """Take an event, in the engine's thread: the one moment at which its books can be read while it is busy."""
        if isinstance(event, FinishedEvent) and number % 16 == 0:
            try:
                for runner in self._engine.model.runners:
                    self.audit(runner)
            except AssertionError as error:
                self._failure = error
        self._events.put((number, event))

    def _handle(self, number: int, event: Event) -> None:
        self._heard += 1
        if number in self._flying:
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, FinishedEvent):
                del self._flying[number]
                self.outcomes["finished"] += 1
        while self._leaving and self._leaving[0][0] <= self._heard:
            _, leaving = heapq.heappop(self._leaving)
            if leaving in self._flying:
                self._engine.cancel(self._flying.pop(leaving))
                self.outcomes["cancelled"] += 1


def main() -> int:
    """Run, print a table, and give exit code 1 when anything leaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ctx-size", type=int, default=1024, help="KV cells, too few on purpose")
    parser.add_argument("--longest", type=int, default=400, help="tokens of the longest prompt")
    parser.add_argument("--sliding-window", action="store_true", help="a model with a window of 63 tokens")
    parser.add_argument("--tolerance", type=float, default=0.02, help="growth of memory that is allowed, as a share")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        window = 63 if arguments.sliding_window else 2047
        checkpoint = write_checkpoint(Path(work) / "model", seed=1, sliding_window=window)
        path = convert(checkpoint, Path(work) / "model.gguf", outtype="f32").path
        settings = EngineSettings(
            path,
            ctx_size=arguments.ctx_size,
            max_queue=2 * _IN_FLIGHT,
            prefix_cache_mib=1,
        )
        engine = Engine(settings)
        engine.load()
        try:
            return _measure(engine, arguments)
        finally:
            engine.close()


def _measure(engine: Engine, arguments: argparse.Namespace) -> int:
    churn = Churn(engine, arguments.seed, arguments.longest)
    process = psutil.Process()
    table = Table(
        "requests", "finished", "cancelled", "audits", "preempted", "cached prompt tokens", "RSS MiB", box=None
    )
    sizes = []
    started = time.monotonic()
    for part in range(10):
        churn.run(arguments.requests // 10)
        stats = engine.stats()
        sizes.append(process.memory_info().rss / 2**20)
        table.add_row(
            str((part + 1) * (arguments.requests // 10)),
            str(churn.outcomes["finished"]),
            str(churn.outcomes["cancelled"]),
            str(churn.audit.checks),
            str(stats.preemptions_total),
            f"{stats.cached_tokens_total / stats.prompt_tokens_total:.0%}",
            f"{sizes[-1]:.1f}",
        )
    Console().print(table)
    growth = sizes[-1] / sizes[1] - 1
    print(
        f"{time.monotonic() - started:.0f} s; memory from the first fifth to the end: {growth:+.2%} "
        f"(allowed: {arguments.tolerance:+.0%}); no sequence and no cell leaked."
    )
    return int(growth > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
