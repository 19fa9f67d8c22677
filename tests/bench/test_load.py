"""Closed and open loops, on an endpoint whose answers take exactly as long as a test says."""

from __future__ import annotations

import asyncio
import itertools
import selectors
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from edge_phi3.bench.endpoints import Answer, Endpoint
from edge_phi3.bench.errors import ExchangeError
from edge_phi3.bench.load import Level, RequestRecord, poisson_arrivals, run_level
from edge_phi3.bench.workload import WORDS, Ask, RandomSessions, Ruler, Workload
from tests.bench.conftest import client_of

RULER = Ruler(WORDS, 1.0, 0, exact=True)


class Waiting(selectors.SelectSelector):
    """Lets time pass when everybody waits: exact on any machine, and a minute passes in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for ever"
            self.now += timeout
        return ready


class VirtualTime(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = Waiting()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class Slow(Endpoint):
    """Answers with three pieces, `seconds` after the request; fails where the prompt says so."""

    def __init__(self, seconds: float, fail: str | None = None) -> None:
        super().__init__(client_of(lambda _: httpx.Response(500)), "chat")
        self.seconds = seconds
        self.fail = fail
        self.busy = self.most_busy = 0
        self.asked: list[Ask] = []
        self.times: list[float] = []

    async def generate(self, ask: Ask, answer: Answer) -> None:
        self.asked.append(ask)
        self.times.append(time.perf_counter())
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            for _ in range(3):
                await asyncio.sleep(self.seconds / 3)
                answer.add(" piece")
            if self.fail and self.fail in ask.turns[-1]:
                raise ExchangeError("HTTP 500: it was told to fail")
        finally:
            self.busy -= 1
        answer.prompt_tokens, answer.completion_tokens = len("".join(ask.turns).split()), 3


Load = Callable[..., list[RequestRecord]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Run a level on an endpoint, in a time that passes while everybody waits."""

    def run(endpoint: Endpoint, level: Level, workload: Workload | None = None, **options: Any) -> list[RequestRecord]:
        workload = workload or Workload(prompt_tokens="5")
        level_run = run_level(endpoint, RandomSessions(workload, RULER), level, **options)
        with asyncio.Runner(loop_factory=VirtualTime) as runner, monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", runner.get_loop().time)
            return runner.run(level_run)[0]

    return run


def end(records: list[RequestRecord]) -> float:
    return max(record.started + record.latency for record in records)


def test_a_closed_loop_keeps_exactly_its_clients_busy(load: Load) -> None:
    endpoint = Slow(0.03)
    records = load(endpoint, Level(clients=4, sessions=12))
    assert endpoint.most_busy == 4
    assert len(records) == 12
    assert sorted(record.session for record in records) == list(range(12))
    assert end(records) == pytest.approx(3 * 0.03)


def test_an_open_loop_does_not_wait_for_answers(load: Load) -> None:
    endpoint = Slow(0.5)
    records = load(endpoint, Level(rate=200, sessions=60))
    arrivals = [*itertools.islice(poisson_arrivals(200, np.random.default_rng([Workload().seed, 0, 2])), 60)]
    assert endpoint.times == pytest.approx(arrivals)
    assert endpoint.most_busy == max(sum(0 <= time - other < 0.5 for other in arrivals) for time in arrivals) > 10
    assert end(records) == pytest.approx(arrivals[-1] + 0.5)


def test_arrivals_are_a_poisson_process() -> None:
    times = np.fromiter(itertools.islice(poisson_arrivals(200, np.random.default_rng(1)), 20_001), float)
    gaps = np.diff(times) * 200
    assert times[0] == 0
    # An exponential distribution: mean, deviation and the share beyond the mean.
    assert gaps.mean() == pytest.approx(1, rel=0.03)
    assert gaps.std() == pytest.approx(1, rel=0.03)
    assert (gaps > 1).mean() == pytest.approx(np.exp(-1), rel=0.03)


def test_a_duration_ends_the_arrivals_and_waits_for_the_answers(load: Load) -> None:
    endpoint = Slow(0.06)
    records = load(endpoint, Level(clients=2, duration=0.2))
    assert sorted(endpoint.times) == pytest.approx([0, 0, 0.06, 0.06, 0.12, 0.12, 0.18, 0.18])
    assert len(records) == 8
    assert end(records) == pytest.approx(0.24)
    assert endpoint.busy == 0


def test_turns_carry_the_answers_that_were_given(load: Load) -> None:
    endpoint = Slow(0.0)
    records = load(endpoint, Level(clients=1, sessions=1), Workload(prompt_tokens="4", turns="3"))
    assert [record.turn for record in records] == [0, 1, 2]
    assert list(endpoint.asked[2].turns)[1] == " piece piece piece"
    assert [record.prompt_tokens for record in records] == [4, 11, 18]


def test_a_failure_ends_its_session_and_nothing_else(load: Load) -> None:
    workload = Workload(prompt_tokens="4", turns="2")
    victim = RandomSessions(workload, RULER)(1).users[0]
    records = load(Slow(0.0, fail=victim), Level(clients=2, sessions=4), workload)
    failed = [record for record in records if record.error]
    assert [(record.session, record.turn, record.error) for record in failed] == [
        (1, 0, "HTTP 500: it was told to fail")
    ]
    assert len(records) == 7


def test_warm_up_is_not_counted_and_asks_something_else(load: Load) -> None:
    endpoint = Slow(0.0)
    seen: list[None] = []
    records = load(endpoint, Level(clients=2, sessions=3, warmup=2), done=lambda: seen.append(None))
    assert len(records) == len(seen) == 3
    assert len({ask.turns[0] for ask in endpoint.asked}) == 5


def test_times_are_those_of_the_pieces(load: Load) -> None:
    record = load(Slow(0.06), Level(clients=1, sessions=1))[0]
    assert record.first == pytest.approx(0.02)
    assert record.gaps == pytest.approx([0.02, 0.02])
    assert record.latency == pytest.approx(0.06)
