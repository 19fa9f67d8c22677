"""``edge-phi3 quantize``: a GGUF file becomes a smaller one."""

from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.conversion.quantize import predict_size, quantize
from edge_phi3.errors import WrongUsageError
from edge_phi3.progress import stderr_progress

_ABOUT_WRITING = {"allow_requantize", "threads", "force"}


def _show_types(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    table = Table("type", "bits per weight", "matrix", "advice", box=None)
    for kind in QUANTIZATION_TYPES.values():
        table.add_row(kind.name, f"{kind.bits_per_weight:g}", "needed" if kind.needs_imatrix else "", kind.advice)
    Console().print(table)
    ctx.exit(0)


def _tensor_types(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [item.partition("=") for item in given]
    for pattern, separator, kind in pairs:
        if not separator or not pattern or not kind:
            raise WrongUsageError(f"--tensor-type: {pattern!r} is not allowed; give PATTERN=TYPE, as in attn_v=q8_0.")
    return {pattern: kind for pattern, _, kind in pairs}


@click.command("quantize")
@click.argument("source", type=click.Path(path_type=Path), help="A GGUF file in F32, F16 or BF16.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option("--type", "kind", default="Q4_K_M", show_default=True, metavar="TYPE", help="What to quantise to.")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_show_types, help="Show all types.")
@click.option("--imatrix", type=click.Path(path_type=Path), help="An importance matrix.")
@click.option(
    "--tensor-type", multiple=True, metavar="PATTERN=TYPE", help="Another type for tensors whose name matches."
)
@click.option("--output-tensor-type", metavar="TYPE", help="The type of the output matrix.")
@click.option("--token-embedding-type", metavar="TYPE", help="The type of the embedding matrix.")
@click.option("--pure", is_flag=True, help="Give every tensor the same type.")
@click.option("--allow-requantize", is_flag=True, help="Quantise tensors that are quantised already, at a loss.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--dry-run", is_flag=True, help="Tell the size of what would be written, and write nothing.")
@click.option("--force", is_flag=True, help="Replace the output when it exists.")
def command(
    source: Path, output: Path | None, *, kind: str, tensor_type: tuple[str, ...], dry_run: bool, **options: Any
) -> None:
    """Make a GGUF file smaller with llama.cpp's quantiser.

    Example: `edge-phi3 quantize phi-3-mini-4k-f16.gguf -o phi-3-mini-4k-Q4_K_M.gguf --type Q4_K_M`
    """
    types = _tensor_types(tensor_type)
    if dry_run:
        without = {name: value for name, value in options.items() if name not in _ABOUT_WRITING}
        plan = predict_size(source, type=kind, tensor_types=types, **without)
        click.echo(plan.bytes)
        click.echo(f"{plan.type.name}, {plan.bits_per_weight:.2f} bits per weight, {decimal(plan.bytes)}", err=True)
        if plan.needs_imatrix and options["imatrix"] is None:
            click.echo(f"{plan.type.name} needs an importance matrix: --imatrix.", err=True)
        return
    if output is None:
        raise WrongUsageError("-o: give the GGUF file to write, or --dry-run to learn its size.")
    with stderr_progress() as progress, progress.step(f"Quantising {source.name}") as step:
        result = quantize(source, output, type=kind, tensor_types=types, progress=step.update, **options)
    click.echo(result.path)
    click.echo(
        f"{result.type.name}, {result.bits_per_weight:.2f} bits per weight, {decimal(result.bytes)}"
        f" in {result.seconds:.1f} s",
        err=True,
    )
