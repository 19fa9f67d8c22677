"""Thousands of requests of every kind through one engine, a third of them cancelled: nothing may leak.

Requests come in random sizes and modes (greedy, sampling, several sequences, beams), many beginning alike, into a KV
cache that is too small for all of them, so that the scheduler preempts, beside a prefix store of one MiB, so that it
drops. While they run, and at rest after every tenth part, the engine's records of cells are checked against themselves
and against the positions that llama.cpp holds for every sequence. The process's memory is sampled at rest: from the
first fifth to the end it must not grow by more than 2 %.

    pytest -m soak                          # 5,000 requests on each model; SOAK_REQUESTS=N for another number
"""

from __future__ import annotations

import heapq
import os
import queue
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.model_runner import ModelRunner
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest, RunningRequest
from edge_phi3.generation.config import GenerationConfig
from tests.golden.checkpoints import write_checkpoint

pytestmark = pytest.mark.soak

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "5000"))
LONGEST_PROMPT = 400
CELLS = 1024
"""Too few on purpose."""
TOLERANCE = 0.02

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
        """Take an event, in the engine's thread: the one moment at which its records can be read while it is busy."""
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


@pytest.mark.parametrize("window", [2047, 63], ids=["no window in reach", "a window of 63 tokens"])
def test_nothing_leaks(window: int, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", seed=1, sliding_window=window)
    path = convert(checkpoint, tmp_path / "model.gguf", outtype="f32").path
    engine = Engine(EngineSettings(path, ctx_size=CELLS, max_queue=2 * _IN_FLIGHT, prefix_cache_mib=1))
    engine.load()
    try:
        churn, process, sizes = Churn(engine, seed=0, longest=LONGEST_PROMPT), psutil.Process(), []
        for _ in range(10):
            churn.run(REQUESTS // 10)
            sizes.append(process.memory_info().rss)
        stats = engine.stats()
        print(f"{churn.outcomes}, {churn.audit.checks} audits, {stats.preemptions_total} preemptions, RSS {sizes}")
        assert churn.outcomes["finished"] > 0
        assert churn.outcomes["cancelled"] > 0
        assert sizes[-1] / sizes[1] - 1 <= TOLERANCE, sizes
    finally:
        engine.close()
