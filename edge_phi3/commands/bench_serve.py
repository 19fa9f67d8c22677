"""``edge-phi3 bench serve``: load on a running service."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge_phi3.bench.load import Level
from edge_phi3.bench.plots import plot_sweep
from edge_phi3.bench.serve import ServeBench, run, table
from edge_phi3.bench.summary import Summary
from edge_phi3.bench.targets import TARGETS
from edge_phi3.bench.workload import FORMS, Workload
from edge_phi3.errors import WrongUsageError

_DEFAULT_SESSIONS = 8


def _numbers(kind: type[int | float]) -> Any:
    def parse(_ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...]:
        try:
            numbers = tuple(kind(part) for part in value.split(",")) if value else ()
        except ValueError:
            numbers = (0,)
        if any(number <= 0 for number in numbers):
            raise click.BadParameter(f"{value!r} is not allowed; give positive numbers, as in 1,4,16.", param=parameter)
        return numbers

    return parse


def _levels(options: dict[str, Any]) -> list[Level]:
    clients, rates = options.pop("clients"), options.pop("rate")
    sessions, duration, warmup = options.pop("requests"), options.pop("duration"), options.pop("warmup")
    if not clients and not rates:
        clients = (1,)
    if rates and sessions is None and duration is None:
        raise WrongUsageError("--rate needs --requests or --duration: an open loop has no end of its own.")
    levels = []
    for number, rate in itertools.chain(zip(clients, itertools.repeat(None)), ((None, rate) for rate in rates)):
        count = _DEFAULT_SESSIONS * number if number and sessions is None and duration is None else sessions
        levels.append(Level(clients=number, rate=rate, sessions=count, duration=duration, warmup=warmup))
    return levels


@click.command("serve", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("url", help="The address of the service, such as http://127.0.0.1:8080.")
@click.option(
    "--clients",
    callback=_numbers(int),
    metavar="N[,N...]",
    help="Number of clients that each send the next request when they have an answer (a closed loop). [default: 1]",
)
@click.option(
    "--rate",
    callback=_numbers(float),
    metavar="R[,R...]",
    help="Mean number of sessions that arrive per second at random (an open loop, Poisson).",
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help=f"Number of sessions at each level of load. [default: {_DEFAULT_SESSIONS} for each client]",
)
@click.option(
    "--duration", type=click.FloatRange(min=0, min_open=True), help="Number of seconds during which new sessions begin."
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Number of sessions before each level that are not measured.",
)
@click.option(
    "--api",
    type=click.Choice(["auto", *TARGETS]),
    default="auto",
    show_default=True,
    help="The kind of endpoint to send requests to.",
)
@click.option("--model", default="", help="Name of the model in requests. [default: the first that the server lists]")
@click.option("--api-key", envvar="EDGE_PHI3_BENCH_API_KEY", help="API key, sent as a bearer token.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds that one request may take.",
)
@click.option(
    "--prompt-tokens",
    default="64",
    show_default=True,
    metavar="LENGTHS",
    help=f"Length of each user turn in tokens: {FORMS}.",
)
@click.option(
    "--output-tokens",
    default="64",
    show_default=True,
    metavar="LENGTHS",
    help="Length of each answer in tokens, in the same forms.",
)
@click.option(
    "--turns",
    default="1",
    show_default=True,
    metavar="LENGTHS",
    help="Number of turns of a session, in the same forms.",
)
@click.option(
    "--shared-prefix",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of tokens that sessions have in common at their beginning.",
)
@click.option(
    "--prefixes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of different shared prefixes."
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='File of prompts to send instead of random words: one per line, plain or {"prompt": "...", "max_tokens": 64}.',
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, help="Sample from the K most likely tokens. [default: all]"
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Sample from the most likely tokens of this probability mass together.",
)
@click.option("--ignore-eos", is_flag=True, help="Generate answers of the full length, past end tokens.")
@click.option("--send-seeds", is_flag=True, help="Send a seed with each sampled request, so that its answer repeats.")
@click.option("--stream/--no-stream", default=True, show_default=True, help="Stream answers as server-sent events.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Random seed; the same seed sends the same prompts.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write all figures and requests to this file as JSON."
)
@click.option(
    "--csv", "csv_file", type=click.Path(path_type=Path), help="Write one row per level of load to this file as CSV."
)
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path), help="Draw throughput against latency into this file."
)
def command(url: str, **options: Any) -> None:
    """Put load on a service and measure it: edge-phi3, llama-server, or any with OpenAI's API.

    Example: `edge-phi3 bench serve http://127.0.0.1:8080 --clients 1,4,16 --plot sweep.svg`

    Another: `edge-phi3 bench serve http://127.0.0.1:8080 --rate 2 --duration 60 --prompt-tokens 32-512`
    """
    outputs = {name: options.pop(f"{name}_file") for name in ("json", "csv", "plot")}
    levels = _levels(options)
    direct = {name: options.pop(name) for name in ("api", "model", "api_key", "prompts", "timeout")}
    bench = ServeBench(url, levels, Workload(**options), **direct)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = [progress.add_task(_name(level), total=level.sessions, start=False) for level in levels]
        at = iter(tasks)
        current = next(at)
        progress.start_task(current)

        def request_done(_: object) -> None:
            progress.advance(current)

        def level_done(_: Summary) -> None:
            nonlocal current
            current = next(at, current)
            progress.start_task(current)

        report = run(bench, request_done=request_done, level_done=level_done)
    Console().print(table(report.levels))
    _explain(report.levels, exact=report.exact_lengths, random=bench.prompts is None)
    if outputs["json"]:
        report.write_json(outputs["json"])
    if outputs["csv"]:
        report.write_csv(outputs["csv"])
    if outputs["plot"]:
        plot_sweep({report.api: report.levels}, outputs["plot"])


def _name(level: Level) -> str:
    return f"{level.clients} clients" if level.rate is None else f"{level.rate:g} arrivals/s"


def _explain(levels: Sequence[Summary], *, exact: bool, random: bool) -> None:
    """Print what the table does not show: how to read its pairs, and what weakens the figures."""
    click.echo("Load is clients, or arrivals a second. Times are milliseconds: median/95th percentile.", err=True)
    if random and not exact:
        click.echo("The server has no /tokenize for exact lengths: prompts are as long as asked on average.", err=True)
    if not all(level.counted for level in levels):
        click.echo("The server does not report generated tokens: pieces of text are counted instead.", err=True)
    if max(level.generator_cores for level in levels) > 0.5:
        click.echo("The load generator itself was busy: run it on another machine for firm figures.", err=True)
    for level in levels:
        for error, count in level.errors.items():
            click.echo(f"{count} failed: {error}", err=True)
