"""``edge-phi3 bench``: measure what is served, and what could be."""

import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edge_phi3.bench import BenchError, quants, serve
from edge_phi3.bench.load import Level, Summary
from edge_phi3.bench.machine import write_csv, write_json
from edge_phi3.bench.options import FILE, ONE_OR_MORE, POSITIVE, ZERO_OR_MORE, options_of
from edge_phi3.bench.plots import plot_quality, plot_speed, plot_sweep
from edge_phi3.bench.workload import Workload
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.errors import WrongUsageError
from edge_phi3.progress import stderr_progress

_DEFAULT_SESSIONS = 8


@click.group("bench")
def command() -> None:
    """Measure a running service, or the quantisations of a model.

    Example: `edge-phi3 bench serve http://127.0.0.1:8080 --clients 1,4,16`

    Another: `edge-phi3 bench quants phi-3-mini-4k-f16.gguf --type Q4_K_M --type Q8_0`
    """


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


@command.command("serve")
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
    type=ONE_OR_MORE,
    help=f"Number of sessions at each level of load. [default: {_DEFAULT_SESSIONS} for each client]",
)
@click.option("--duration", type=POSITIVE, help="Number of seconds during which new sessions begin.")
@click.option(
    "--warmup",
    type=ZERO_OR_MORE,
    default=2,
    show_default=True,
    help="Number of sessions before each level that are not measured.",
)
@options_of(serve.ServeBench)
@options_of(Workload)
@click.option("--json", "json_file", type=FILE, help="Write all figures and requests to this file as JSON.")
@click.option("--csv", "csv_file", type=FILE, help="Write one row per level of load to this file as CSV.")
@click.option("--plot", "plot_file", type=FILE, help="Draw throughput against latency into this file.")
def _serve(url: str, **options: Any) -> None:
    """Put load on a service and measure it: edge-phi3, llama-server, or any with OpenAI's API.

    Example: `edge-phi3 bench serve http://127.0.0.1:8080 --clients 1,4,16 --plot sweep.svg`

    Another: `edge-phi3 bench serve http://127.0.0.1:8080 --rate 2 --duration 60 --prompt-tokens 32-512`
    """
    levels = _levels(options)
    direct = {name: options.pop(name) for name in serve.ServeBench.__struct_fields__ if name in options}
    files = {name: options.pop(f"{name}_file") for name in ("json", "csv", "plot")}
    bench = serve.ServeBench(url, levels, Workload(**options), **direct)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        names = [f"{one.clients} clients" if one.rate is None else f"{one.rate:g} arrivals/s" for one in levels]
        tasks = [
            progress.add_task(name, start=False, total=one.sessions) for name, one in zip(names, levels, strict=True)
        ]

        def request_done(number: int) -> None:
            progress.start_task(tasks[number])
            progress.advance(tasks[number])

        report = uvloop.run(serve.measure(bench, request_done))
    Console().print(serve.table(report.levels))
    _explain(report.levels, exact=report.exact_lengths, random=bench.prompts is None)
    if files["json"]:
        write_json(files["json"], report)
    if files["csv"]:
        write_csv(files["csv"], report.rows())
    if files["plot"]:
        plot_sweep(report.api, report.levels, files["plot"])


def _explain(levels: Sequence[Summary], *, exact: bool, random: bool) -> None:
    """Print what the table does not show: how to read its pairs, and what weakens the figures."""
    said = ["Load is clients, or arrivals a second. Times are milliseconds: median/95th percentile."]
    if random and not exact:
        said.append("The server has no /tokenize for exact lengths: prompts have the requested length on average.")
    if not all(level.counted for level in levels):
        said.append("The server does not report generated tokens: pieces of text are counted instead.")
    if max(level.generator_cores for level in levels) > 0.5:
        said.append("The load generator itself was busy: run it on another machine for firm figures.")
    said += [f"{count} failed: {error}" for level in levels for error, count in level.errors.items()]
    click.echo("\n".join(said), err=True)


@command.command("quants")
@click.argument("model", help="A GGUF in F16, BF16 or F32, a checkpoint folder, or demo for the bundled model.")
@options_of(quants.QuantBench)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
def _quants(model: str, *, as_json: bool, **options: Any) -> None:
    """Compare quantisations of one model: size, quality against F16, speed, memory, load time.

    Example: `edge-phi3 bench quants phi-3-mini-4k-f16.gguf --type Q4_K_M --type Q8_0`

    Another: `edge-phi3 bench quants demo --type all --output-dir demo-quants`
    """
    path = DEMO_CHECKPOINT if model == "demo" and not Path(model).exists() else Path(model)
    asked = shlex.join(["edge-phi3", *sys.argv[1:]])
    bench = quants.QuantBench(model=path, command=asked, **options)
    with stderr_progress() as progress:
        report = quants.run(bench, progress=progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        # A narrow terminal, or none, would cut the figures; lines that wrap can still be read.
        console = Console()
        Console(width=max(console.width, 150)).print(quants.table(report))
    reference = report.measurements[0]
    click.echo(
        f"{reference.quality.positions} tokens of {report.text} in {reference.quality.chunks} chunks of"
        f" {report.ctx_size}. KL: divergence from {reference.type} in nats. A star: no other type is as small and as"
        f" good. Speed: one sequence, {reference.speed.prompt_tokens} tokens of prompt,"
        f" {reference.speed.generated_tokens} generated.",
        err=True,
    )
    for name, draw in (("quality.svg", plot_quality), ("speed.svg", plot_speed)):
        try:
            draw(report.measurements, bench.output_dir / name)
        except BenchError as error:
            click.echo(f"No {name}: {error}", err=True)
