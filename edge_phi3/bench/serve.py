"""Measure a running service: one or several levels of load, as a report that people and programs can read."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import rich_click as click
from rich.table import Table

from edge_phi3.bench import BenchError
from edge_phi3.bench.endpoints import APIS, HttpClient, measure_ruler, open_endpoint
from edge_phi3.bench.load import Distribution, Level, RequestRecord, Summary, run_level, summarise
from edge_phi3.bench.machine import Machine, columns
from edge_phi3.bench.options import FILE, POSITIVE, Option
from edge_phi3.bench.workload import FileSessions, RandomSessions, Sessions, Workload

_DISTRIBUTIONS = ("first_token", "per_token", "gap", "latency")


class ServeBench(msgspec.Struct, frozen=True):
    """What to measure: the service at `url`, with `workload`, at each of `levels` of load in turn."""

    url: str
    levels: Sequence[Level]
    workload: Workload = Workload()
    api: Annotated[str, Option("The kind of endpoint to send requests to.", click.Choice(["auto", *APIS]))] = "auto"
    model: Annotated[str, Option("Name of the model in requests. [default: the first that the server lists]")] = ""
    api_key: Annotated[
        str | None, Option("API key, sent as a bearer token.", str, envvar="EDGE_PHI3_BENCH_API_KEY")
    ] = None
    prompts: Annotated[
        Path | None,
        Option(
            'File of prompts instead of random words: one per line, plain or {"prompt": "...", "max_tokens": 64}.',
            FILE,
            "FILE",
        ),
    ] = None
    timeout: Annotated[float, Option("Seconds that one request may take.", POSITIVE)] = 600.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, from which machine; `exact_lengths` is whether prompts had exactly the requested tokens."""

    machine: Machine
    url: str
    api: str
    model: str
    workload: Workload
    exact_lengths: bool
    levels: list[Summary]
    requests: list[list[RequestRecord]]

    def rows(self) -> list[dict[str, Any]]:
        """Return the columns of each level, for a CSV file."""
        nested = dict.fromkeys(_DISTRIBUTIONS, Distribution)
        return [
            columns(level, **nested)
            | {"errors": "; ".join(f"{count}x {error}" for error, count in level.errors.items())}
            for level in self.levels
        ]


async def measure(bench: ServeBench, done: Callable[[int], None] = lambda _: None) -> Report:
    """Measure a service; `done` is called with the number of its level when a request ends.

    `BenchError` says why nothing was measured: the service is not there, no request succeeded, or an option is wrong.
    """
    machine = Machine.here()
    client = HttpClient(bench.url, api_key=bench.api_key, timeout=bench.timeout)
    levels: list[Summary] = []
    requests: list[list[RequestRecord]] = []
    try:
        endpoint = await open_endpoint(client, bench.api, bench.model)
        exact = False
        sessions: Sessions
        if bench.prompts is not None:
            sessions = FileSessions(bench.prompts, bench.workload)
        else:
            ruler = await measure_ruler(endpoint)
            sessions, exact = RandomSessions(bench.workload, ruler), ruler.exact
        for number, level in enumerate(bench.levels):
            records, cpu_seconds = await run_level(
                endpoint, sessions, level, first_session=number * 10_000_000, done=functools.partial(done, number)
            )
            levels.append(summarise(level, records, cpu_seconds))
            requests.append(records)
            if levels[-1].requests == 0:
                reason = next(iter(levels[-1].errors), "none was sent")
                raise BenchError(f"No request to {client.url} succeeded: {reason}")
    finally:
        await client.close()
    return Report(
        machine=machine,
        url=client.url,
        api=endpoint.name,
        model=endpoint.model,
        workload=bench.workload,
        exact_lengths=exact,
        levels=levels,
        requests=requests,
    )


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
            *(_pair(getattr(level, name)) for name in _DISTRIBUTIONS),
        )
    return result


def _pair(times: Distribution | None) -> str:
    if times is None:
        return "-"
    digits = 2 if times.p50 < 0.01 else 1 if times.p50 < 0.1 else 0
    return f"{times.p50 * 1e3:.{digits}f}/{times.p95 * 1e3:.{digits}f}"
