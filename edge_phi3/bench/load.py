"""Load on a running service: a fixed number of users, or users who arrive by chance.

In a closed loop each of N clients asks again as soon as it has its answer, which shows what a server can do. In an
open loop sessions arrive in a Poisson process whatever the server does, which shows what its users would see: only
there does a queue grow when the server is too slow (Schroeder, Wierman and Harchol-Balter, "Open Versus Closed: A
Cautionary Tale", NSDI 2006).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from edge_phi3.bench.answers import Answer
from edge_phi3.bench.errors import ExchangeError
from edge_phi3.bench.targets import Target
from edge_phi3.bench.workload import Session, Sessions, Workload


class RequestRecord(msgspec.Struct):
    """What happened to one request. Times are seconds.

    Attributes:
        session: number of its session.
        turn: which turn of the session it was, from 0.
        started: when it was sent, from the start of the level.
        latency: from then to the end of its answer.
        first: from then to the first piece of text, or None when nothing was streamed.
        gaps: between one piece and the next.
        prompt_tokens: tokens of the prompt, or None when the server did not say.
        completion_tokens: tokens generated; pieces of text where the server did not say.
        counted: whether the server said.
        cached_tokens: tokens of the prompt that came from a cache, or None.
        error: why it failed, or None.
    """

    session: int
    turn: int
    started: float
    latency: float
    first: float | None
    gaps: list[float]
    prompt_tokens: int | None
    completion_tokens: int
    counted: bool
    cached_tokens: int | None
    error: str | None


class Level(msgspec.Struct, frozen=True):
    """One strength of load: either `clients` or `rate` is set.

    Attributes:
        clients: users of a closed loop.
        rate: sessions per second of an open loop.
        sessions: how many sessions are run, or None.
        duration: for how many seconds new sessions begin, or None.
        warmup: sessions run before the measured ones.
    """

    clients: int | None = None
    rate: float | None = None
    sessions: int | None = None
    duration: float | None = None
    warmup: int = 0


@dataclass(frozen=True, slots=True)
class LevelRun:
    """A level that has been run.

    Attributes:
        level: what was asked.
        seconds: from the first request to the end of the last.
        cpu_seconds: processor time that the load generator itself took.
        records: one for each request, in the order of their ends.
    """

    level: Level
    seconds: float
    cpu_seconds: float
    records: list[RequestRecord]


Done = Callable[[RequestRecord], None]


async def run_level(
    target: Target,
    sessions: Sessions,
    workload: Workload,
    level: Level,
    *,
    first_session: int = 0,
    done: Done = lambda _: None,
) -> LevelRun:
    """Run one level.

    Args:
        target: who is asked.
        sessions: what is asked.
        workload: how.
        level: the strength, and when to stop.
        first_session: number of the first session. Two levels with other numbers share no prompt.
        done: called with each measured request when it ends.
    """
    if level.warmup:
        numbers = itertools.count(first_session + 1_000_000)
        warm = _Run(target, workload, lambda _: None)
        await _closed_loop(
            warm, (sessions(next(numbers)) for _ in range(level.warmup)), min(level.clients or 4, level.warmup)
        )
    run = _Run(target, workload, done)
    chosen = _until_done(sessions, level, first_session)
    cpu = time.process_time()
    if level.rate is None:
        await _closed_loop(run, chosen, level.clients or 1)
    else:
        await _open_loop(run, chosen, level.rate, np.random.default_rng([workload.seed, first_session, 2]))
    ends = [record.started + record.latency for record in run.records]
    return LevelRun(level, max(ends, default=0.0), time.process_time() - cpu, run.records)


def _until_done(sessions: Sessions, level: Level, first: int) -> Iterator[Session]:
    start = time.perf_counter()
    numbers = itertools.count(first) if level.sessions is None else range(first, first + level.sessions)
    for number in numbers:
        if level.duration is not None and time.perf_counter() - start >= level.duration:
            return
        yield sessions(number)


async def _closed_loop(run: _Run, sessions: Iterator[Session], clients: int) -> None:
    async def client() -> None:
        for session in sessions:
            await run.session(session)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())


def poisson_arrivals(rate: float, random: np.random.Generator) -> Iterator[float]:
    """Return the arrival times of a Poisson process, in seconds from the first one; without end."""
    due = 0.0
    while True:
        yield due
        due += random.exponential(1 / rate)


async def _open_loop(run: _Run, sessions: Iterator[Session], rate: float, random: np.random.Generator) -> None:
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        # The time comes first: `sessions` may end by the clock.
        for due in poisson_arrivals(rate, random):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            session = next(sessions, None)
            if session is None:
                return
            group.create_task(run.session(session))


class _Run:
    """The requests of one level."""

    def __init__(self, target: Target, workload: Workload, done: Done) -> None:
        self.records: list[RequestRecord] = []
        self._target = target
        self._workload = workload
        self._done = done
        self._start = time.perf_counter()

    async def session(self, session: Session) -> None:
        """Run a session to its end, or to its first failure."""
        said: list[str] = []
        for turn in range(len(session.users)):
            ask = session.ask(said, self._workload)
            answer, error = Answer(), None
            started = time.perf_counter()
            try:
                await self._target.generate(ask, answer)
            except ExchangeError as failure:
                error = str(failure)
            record = self._record(session.number, turn, started, answer, error)
            self.records.append(record)
            self._done(record)
            if error is not None:
                return
            said = [*ask.turns, answer.text]

    def _record(self, session: int, turn: int, started: float, answer: Answer, error: str | None) -> RequestRecord:
        times = answer.times
        counted = answer.completion_tokens is not None
        return RequestRecord(
            session=session,
            turn=turn,
            started=started - self._start,
            latency=time.perf_counter() - started,
            first=times[0] - started if times and self._workload.stream else None,
            gaps=[after - before for before, after in itertools.pairwise(times)],
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens if counted and answer.completion_tokens else len(times),
            counted=counted,
            cached_tokens=answer.cached_tokens,
            error=error,
        )
