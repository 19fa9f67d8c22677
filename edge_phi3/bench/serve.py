"""Measure a running service: one or several levels of load, as a report that people and programs can read."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.http_client import HttpClient
from edge_phi3.bench.load import Level, LevelRun, RequestRecord, run_level
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.summary import Distribution, Summary, summarise
from edge_phi3.bench.targets import Target, open_target
from edge_phi3.bench.workload import FileSessions, RandomSessions, Sessions, Workload, measure_ruler
from edge_phi3.bench.written import write_csv, write_json

LevelDone = Callable[[Summary], None]
RequestDone = Callable[[RequestRecord], None]

_SESSIONS_APART = 10_000_000
_DISTRIBUTIONS = ("first_token", "per_token", "gap", "latency")


@dataclass(frozen=True, slots=True)
class ServeBench:
    """What to measure.

    Attributes:
        url: address of the service.
        levels: the levels of load, in order.
        workload: what is asked.
        api: which endpoint, a name of `targets.TARGETS`, or "auto".
        model: the model to name in requests; found when empty.
        api_key: sent as a bearer token.
        prompts: a file of prompts, instead of random words.
        timeout: seconds that a request may take.
    """

    url: str
    levels: Sequence[Level]
    workload: Workload = field(default_factory=Workload)
    api: str = "auto"
    model: str = ""
    api_key: str | None = None
    prompts: Path | None = None
    timeout: float = 600.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured.

    Attributes:
        machine: where the load generator ran; the service may have run elsewhere.
        url: address of the service.
        api: the endpoint.
        model: the model named in requests, if any.
        workload: what was asked.
        exact_lengths: whether prompts had exactly the tokens asked for.
        levels: the figures of each level.
        requests: the requests of each level.
    """

    machine: Machine
    url: str
    api: str
    model: str
    workload: Workload
    exact_lengths: bool
    levels: list[Summary]
    requests: list[list[RequestRecord]]

    def write_json(self, path: Path) -> None:
        """Write everything, replacing the file."""
        write_json(path, self)

    def write_csv(self, path: Path) -> None:
        """Write one row for each level, replacing the file; distributions become columns such as ``latency_p95``."""
        write_csv(path, [_flat(level) for level in self.levels])


def run(
    bench: ServeBench,
    *,
    request_done: RequestDone = lambda _: None,
    level_done: LevelDone = lambda _: None,
) -> Report:
    """Measure a service.

    Args:
        bench: what to measure.
        request_done: called with each request when it ends.
        level_done: called with the figures of each level when it ends.

    Raises:
        BenchError: nothing was measured: the service is not there, no request succeeded, or an option is wrong.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(measure(bench, request_done=request_done, level_done=level_done))


async def measure(
    bench: ServeBench,
    *,
    request_done: RequestDone = lambda _: None,
    level_done: LevelDone = lambda _: None,
) -> Report:
    """Do what `run` does, inside an event loop that runs already."""
    machine = Machine.here()
    client = HttpClient(bench.url, api_key=bench.api_key, timeout=bench.timeout)
    try:
        target = await open_target(client, bench.api, bench.model)
        sessions, exact = await _sessions(bench, target)
        runs: list[LevelRun] = []
        summaries: list[Summary] = []
        for number, level in enumerate(bench.levels):
            first = number * _SESSIONS_APART
            runs.append(
                await run_level(target, sessions, bench.workload, level, first_session=first, done=request_done)
            )
            summaries.append(_checked(summarise(runs[-1]), client))
            level_done(summaries[-1])
    finally:
        client.close()
    return Report(
        machine=machine,
        url=client.url,
        api=target.name,
        model=target.model,
        workload=bench.workload,
        exact_lengths=exact,
        levels=summaries,
        requests=[level_run.records for level_run in runs],
    )


async def _sessions(bench: ServeBench, target: Target) -> tuple[Sessions, bool]:
    """Return what is asked, and whether its prompts have exactly the tokens asked for."""
    if bench.prompts is not None:
        return FileSessions(bench.prompts, bench.workload), False
    ruler = await measure_ruler(target)
    return RandomSessions(bench.workload, ruler), ruler.exact


def _checked(summary: Summary, client: HttpClient) -> Summary:
    if summary.requests == 0:
        reason = next(iter(summary.errors), "none was sent")
        raise BenchError(f"No request to {client.url} succeeded: {reason}")
    return summary


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop  # noqa: PLC0415 - there is no uvloop for Windows

    return uvloop.new_event_loop


def _flat(summary: Summary) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in summary.__struct_fields__:
        value = getattr(summary, name)
        if name in _DISTRIBUTIONS:
            for part in Distribution.__struct_fields__:
                row[f"{name}_{part}"] = None if value is None else getattr(value, part)
        else:
            row[name] = "; ".join(f"{count}x {error}" for error, count in value.items()) if name == "errors" else value
    return row


def table(levels: Sequence[Summary]) -> Table:
    """Return the figures as a table: times in milliseconds, as median / 95th percentile."""
    result = Table(box=None, padding=(0, 1))
    for heading in ("load", "done", "failed", "tok/s", "req/s", "TTFT", "TPOT", "gap", "latency"):
        result.add_column(heading, justify="right", no_wrap=True)
    for level in levels:
        result.add_row(
            str(level.clients) if level.rate is None else f"{level.rate:g}/s",
            str(level.requests),
            str(level.failed) if level.failed == 0 else f"[red]{level.failed}",
            f"{level.tokens_per_second:.1f}",
            f"{level.requests_per_second:.2f}",
            *(_pair(times) for times in (level.first_token, level.per_token, level.gap, level.latency)),
        )
    return result


def _pair(times: Distribution | None) -> str:
    if times is None:
        return "-"
    digits = 2 if times.p50 < 0.01 else 1 if times.p50 < 0.1 else 0
    return f"{times.p50 * 1e3:.{digits}f}/{times.p95 * 1e3:.{digits}f}"
