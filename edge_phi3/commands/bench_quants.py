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
from edge_phi3.bench.options import options_of
from edge_phi3.bench.plots import plot_quality, plot_speed
from edge_phi3.bench.quant_report import table
from edge_phi3.bench.quants import QuantBench, run
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.progress import stderr_progress

_DEMO = "demo"
_WIDTH = 150


@click.command("quants", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", help="A GGUF in F16, BF16 or F32, a checkpoint folder, or demo for the bundled model.")
@options_of(QuantBench)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
def command(model: str, *, as_json: bool, **options: Any) -> None:
    """Compare quantisations of one model: size, quality against F16, speed, memory, load time.

    Example: `edge-phi3 bench quants phi-3-mini-4k-f16.gguf --type Q4_K_M --type Q8_0`

    Another: `edge-phi3 bench quants demo --type all --output-dir demo-quants`
    """
    path = DEMO_CHECKPOINT if model == _DEMO and not Path(model).exists() else Path(model)
    asked = shlex.join(["edge-phi3", *sys.argv[1:]])
    bench = QuantBench(model=path, command=asked, **options)
    with stderr_progress() as progress:
        report = run(bench, progress=progress)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        # A narrow terminal, or none, would cut the figures; lines that wrap can still be read.
        console = Console()
        Console(width=max(console.width, _WIDTH)).print(table(report))
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
