"""Load on a running service, a fixed number of users or users who arrive by chance, and the figures that come of it.

In a closed loop each of N clients asks again as soon as it has its answer, which shows what a server can do. In an
open loop sessions arrive in a Poisson process whatever the server does, which shows what its users would see: only
there does a queue grow when the server is too slow (Schroeder, Wierman and Harchol-Balter, "Open Versus Closed: A
Cautionary Tale", NSDI 2006). The figures have the meanings that vLLM's and llama.cpp's benchmarks give them.
"""

import asyncio
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from edge_phi3.bench import ExchangeError
from edge_phi3.bench.endpoints import Answer, Endpoint
from edge_phi3.bench.workload import Session, Sessions

_Conversation = Callable[[Session], Coroutine[Any, Any, None]]


class RequestRecord(msgspec.Struct):
    """What happened to one request, a `turn` of its session from 0 on.

    Times are seconds: it was `started` after the start of the level, `first` is the first piece of text, None when
    nothing was streamed, and `gaps` lie between the pieces. Where the server did not say the `completion_tokens`,
    which `counted` tells, they are pieces of text. `cached_tokens` are those of the prompt that came from a cache.
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
    """One strength of load: either `clients` of a closed loop, or a `rate` of sessions per second in an open one.

    So many `sessions` are run, or those that begin within `duration` seconds; `warmup` ones before are not measured.
    """

    clients: int | None = None
    rate: float | None = None
    sessions: int | None = None
    duration: float | None = None
    warmup: int = 0


async def run_level(
    endpoint: Endpoint,
    sessions: Sessions,
    level: Level,
    *,
    first_session: int = 0,
    done: Callable[[], None] = lambda: None,
) -> tuple[list[RequestRecord], float]:
    """Run one level; `done` is called when a measured request ends.

    Levels with other first sessions share no prompt. Return what happened to each request, in the order of their ends,
    and the processor seconds of the load generator.
    """
    if level.warmup:
        numbers = range(first_session + 1_000_000, first_session + 1_000_000 + level.warmup)
        warm_up = functools.partial(_converse, endpoint, [], 0.0, lambda: None)
        await _closed_loop(warm_up, map(sessions, numbers), min(level.clients or 4, level.warmup))
    records: list[RequestRecord] = []
    run = functools.partial(_converse, endpoint, records, time.perf_counter(), done)
    chosen = _until_done(sessions, level, first_session)
    cpu = time.process_time()
    if level.rate is None:
        await _closed_loop(run, chosen, level.clients or 1)
    else:
        random = np.random.default_rng([sessions.workload.seed, first_session, 2])
        await _open_loop(run, chosen, level.rate, random)
    return records, time.process_time() - cpu


def _until_done(sessions: Sessions, level: Level, first: int) -> Iterator[Session]:
    start = time.perf_counter()
    numbers = itertools.count(first) if level.sessions is None else range(first, first + level.sessions)
    for number in numbers:
        if level.duration is not None and time.perf_counter() - start >= level.duration:
            return
        yield sessions(number)


async def _closed_loop(run: _Conversation, sessions: Iterator[Session], clients: int) -> None:
    async def client() -> None:
        for session in sessions:
            await run(session)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())


def poisson_arrivals(rate: float, random: np.random.Generator) -> Iterator[float]:
    """Return the arrival times of a Poisson process, in seconds from the first one; without end."""
    due = 0.0
    while True:
        yield due
        due += random.exponential(1 / rate)


async def _open_loop(run: _Conversation, sessions: Iterator[Session], rate: float, random: np.random.Generator) -> None:
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        # The time comes first: `sessions` may end by the clock.
        for due in poisson_arrivals(rate, random):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            session = next(sessions, None)
            if session is None:
                return
            group.create_task(run(session))


async def _converse(
    endpoint: Endpoint, records: list[RequestRecord], start: float, done: Callable[[], None], session: Session
) -> None:
    """Run a session to its end, or to its first failure; `start` is when the level began."""
    said: list[str] = []
    for turn in range(len(session.users)):
        ask = session.ask(said)
        answer, error = Answer(), None
        started = time.perf_counter()
        try:
            await endpoint.generate(ask, answer)
        except ExchangeError as failure:
            error = str(failure)
        times = answer.times
        records.append(
            RequestRecord(
                session=session.number,
                turn=turn,
                started=started - start,
                latency=time.perf_counter() - started,
                first=times[0] - started if times and ask.how.stream else None,
                gaps=[after - before for before, after in itertools.pairwise(times)],
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens or len(times),
                counted=answer.completion_tokens is not None,
                cached_tokens=answer.cached_tokens,
                error=error,
            )
        )
        done()
        if error is not None:
            return
        said = [*ask.turns, answer.text]


class Distribution(msgspec.Struct, frozen=True):
    """Seconds, over all requests (or pieces) of a level."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a level. Rates count finished requests only; None is what the server does not report.

    Attributes:
        seconds: from the first request to the end of the last.
        total_tokens_per_second: prompt tokens counted as well.
        prompt_tokens, completion_tokens: means of a request.
        counted: whether the server reported every request's tokens; if not, pieces of text were counted.
        cached_share: share of prompt tokens that came from a cache.
        first_token, latency: from sending a request to the first piece of its answer (TTFT), and to its end.
        per_token: of one request, seconds per token after the first (TPOT).
        gap: between two pieces of one answer (inter-token latency).
        generator_cores: processor cores that the load generator kept busy.
    """

    clients: int | None
    rate: float | None
    requests: int
    failed: int
    errors: dict[str, int]
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    total_tokens_per_second: float | None
    prompt_tokens: float | None
    completion_tokens: float
    counted: bool
    cached_share: float | None
    first_token: Distribution | None
    per_token: Distribution | None
    gap: Distribution | None
    latency: Distribution | None
    generator_cores: float


def summarise(level: Level, records: Sequence[RequestRecord], cpu_seconds: float) -> Summary:
    """Return the figures of a level, which took so many processor seconds of the load generator."""
    finished = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    seconds = max((record.started + record.latency for record in records), default=0.0)
    generated = sum(record.completion_tokens for record in finished)
    prompts = [record.prompt_tokens for record in finished if record.prompt_tokens is not None]
    cached = [record.cached_tokens for record in finished if record.cached_tokens is not None]
    all_prompts = len(prompts) == len(finished) > 0
    return Summary(
        clients=level.clients,
        rate=level.rate,
        requests=len(finished),
        failed=len(errors),
        errors=dict(Counter(errors).most_common()),
        seconds=seconds,
        requests_per_second=len(finished) / seconds if finished else 0.0,
        tokens_per_second=generated / seconds if finished else 0.0,
        total_tokens_per_second=(generated + sum(prompts)) / seconds if all_prompts else None,
        prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
        completion_tokens=generated / len(finished) if finished else 0.0,
        counted=all(record.counted for record in finished),
        cached_share=sum(cached) / sum(prompts) if cached and all_prompts else None,
        first_token=_distribution(record.first for record in finished if record.first is not None),
        per_token=_distribution(filter(None, map(per_token, finished))),
        gap=_distribution(gap for record in finished for gap in record.gaps),
        latency=_distribution(record.latency for record in finished),
        generator_cores=cpu_seconds / seconds if records else 0.0,
    )


def per_token(record: RequestRecord) -> float | None:
    """Return a request's seconds per token after the first, or None when it has only one or was not streamed.

    The first piece is taken to be the first token and the last piece to be the last one.
    """
    if record.first is None or record.completion_tokens < 2:
        return None
    return sum(record.gaps) / (record.completion_tokens - 1)


def _distribution(values: Iterable[float]) -> Distribution | None:
    if not (listed := list(values)):
        return None
    figures: list[float] = [float(np.mean(listed)), *np.percentile(listed, [50, 90, 95, 99]).tolist(), max(listed)]
    return Distribution(*figures)
