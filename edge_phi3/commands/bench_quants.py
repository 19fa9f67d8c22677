"""``edge-phi3 bench quants``: which quantisation, how good, how fast."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click
from rich.console import Console

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.plots import plot_quality, plot_speed
from edge_phi3.bench.quant_report import QuantReport, table
from edge_phi3.bench.quants import DEFAULT_TYPES, QuantBench, run
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.progress import stderr_progress

_DEMO = "demo"
_WIDTH = 150


@click.command("quants", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", help="A GGUF in F16, BF16 or F32, a checkpoint folder, or demo for the bundled model.")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    help=f"A quantisation type, or all; repeatable. [default: {', '.join(DEFAULT_TYPES)}]",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text to evaluate, in UTF-8. [default: the packaged text]",
)
@click.option(
    "--parse-special/--no-parse-special",
    default=True,
    show_default=True,
    help="Read special tokens such as <|user|> in the text as tokens; llama-perplexity reads them as characters.",
)
@click.option(
    "--imatrix",
    default="auto",
    show_default=True,
    metavar="auto|FILE|none",
    help="Importance matrix for types of fewer than 8 bits; auto collects one from the packaged calibration text.",
)
@click.option(
    "--ctx-size",
    type=click.IntRange(min=4),
    default=512,
    show_default=True,
    help="Number of tokens in a chunk of the text.",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Maximum number of chunks to evaluate.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads. [default: physical cores]")
@click.option("--n-gpu-layers", type=int, default=-1, show_default=True, help="Number of layers on the GPU; -1 is all.")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Length of the prompt that is timed, in tokens.",
)
@click.option(
    "--generate-tokens",
    "generated_tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Number of tokens that are generated and timed after the prompt.",
)
@click.option(
    "--repetitions",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of times that speed is measured; medians are reported.",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path),
    default=Path("bench-quants"),
    show_default=True,
    help="Folder for results, plots, and what the next run can use again.",
)
@click.option("--keep-models", is_flag=True, help="Keep the quantised files in the output folder.")
@click.option("--again", is_flag=True, help="Measure again what the output folder has results of.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
def command(model: str, *, types: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compare quantisations of one model: size, quality against F16, speed, memory, load time.

    Example: `edge-phi3 bench quants phi-3-mini-4k-f16.gguf --type Q4_K_M --type Q8_0`

    Another: `edge-phi3 bench quants demo --type all --output-dir demo-quants`
    """
    path = DEMO_CHECKPOINT if model == _DEMO and not Path(model).exists() else Path(model)
    asked = shlex.join(["edge-phi3", *sys.argv[1:]])
    bench = QuantBench(model=path, types=types or DEFAULT_TYPES, command=asked, **options)
    with stderr_progress() as progress:
        report = run(bench, progress=progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        # A narrow terminal, or none, would cut the figures; lines that wrap can still be read.
        console = Console()
        Console(width=max(console.width, _WIDTH)).print(table(report))
    _explain(report)
    _draw(report, bench.output_dir)


def _explain(report: QuantReport) -> None:
    reference = report.measurements[0]
    click.echo(
        f"{reference.quality.positions} tokens of {report.text} in {reference.quality.chunks} chunks of"
        f" {report.ctx_size}. KL: divergence from {reference.type} in nats. A star: no other type is as small and as"
        f" good. Speed: one sequence, {reference.speed.prompt_tokens} tokens of prompt,"
        f" {reference.speed.generated_tokens} generated.",
        err=True,
    )


def _draw(report: QuantReport, folder: Path) -> None:
    for name, draw in (("quality.svg", plot_quality), ("speed.svg", plot_speed)):
        try:
            draw(report.measurements, folder / name)
        except BenchError as error:
            click.echo(f"No {name}: {error}", err=True)
