"""``edge-phi3 pull``: from a checkpoint, on the Hub or here, to quantised files, in the store or in another folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import rich_click as click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from edge_phi3.catalog import Catalog, parse_reference
from edge_phi3.catalog.build import make_files
from edge_phi3.catalog.reference import HubCheckpoint, LocalCheckpoint
from edge_phi3.commands.models import STORE
from edge_phi3.errors import WrongUsageError
from edge_phi3.progress import stderr_progress

if TYPE_CHECKING:
    from edge_phi3.conversion.journey import Stop


@click.command("pull")
@click.argument(
    "model", help="A preset's name, a Hub repository (OWNER/NAME, OWNER/NAME@REVISION), or a checkpoint folder."
)
@click.option(
    "--quant",
    "quants",
    multiple=True,
    default=["Q4_K_M"],
    show_default=True,
    metavar="TYPE",
    help="A type that a checkpoint is quantised to; repeatable.",
)
@STORE
@click.option("--refresh", is_flag=True, help="Ask the Hub whether there is a newer revision.")
@click.option("--keep-intermediate", is_flag=True, help="Keep the checkpoint, to quantise it again later.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Make the files in this folder instead of the store; the checkpoint and the unquantised file stay there too.",
)
@click.option(
    "--imatrix",
    metavar="auto|none|FILE",
    help="With --output-dir: an importance matrix for types under 8 bits; auto collects one.  [default: auto]",
)
@click.option("--imatrix-chunks", type=click.IntRange(min=1), help="With --output-dir: chunks of its text at most.")
@click.option("--threads", type=click.IntRange(min=1), help="With --output-dir: CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="With --output-dir: print the files as JSON.")
def command(
    model: str,
    *,
    quants: tuple[str, ...],
    store: Path | None,
    refresh: bool,
    keep_intermediate: bool,
    output_dir: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Download, convert and quantise what is missing of a model; run it again after an interruption, and it goes on.

    Example: `edge-phi3 pull phi-3-mini-4k-instruct --quant Q4_K_M`

    Another: `edge-phi3 pull phi-3-mini-4k-instruct --quant Q4_K_M --quant IQ2_M --imatrix auto --output-dir models`
    """
    options = {name: value for name, value in options.items() if value is not None}
    if output_dir is not None:
        wanted = parse_reference(model)
        if not isinstance(wanted, HubCheckpoint | LocalCheckpoint):
            raise WrongUsageError(f"{model} is a GGUF already; quantise it with `edge-phi3 quantize`.")
        with stderr_progress() as progress:
            stops = make_files(wanted, quants, output_dir, progress, **options)
        _show(stops, as_json=as_json)
        return
    if unfit := [*options, *(["json"] if as_json else [])]:
        raise WrongUsageError(f"--{unfit[0].replace('_', '-')}: give --output-dir too; the store's models do without.")
    with stderr_progress() as progress:
        models = Catalog(store).pull(
            model, quants, progress=progress, refresh=refresh, keep_intermediate=keep_intermediate
        )
    for stored in models:
        click.echo(stored.path)
        click.echo(f"{stored.name}: {decimal(stored.path.stat().st_size)} from {stored.source}", err=True)


def _show(stops: list[Stop], *, as_json: bool) -> None:
    rows = [
        {
            "file": str(stop.path),
            "type": stop.made.type,
            "bits_per_weight": stop.made.bits_per_weight,
            "size": stop.made.seen.size,
            "seconds": stop.made.seconds,
            "sha256": stop.made.seen.sha256,
            "made_now": stop.fresh,
        }
        for stop in stops
    ]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows)))
        return
    table = Table("file", "type", "bits per weight", "size", "seconds", "sha256", box=None)
    for stop in stops:
        made = stop.made
        bits = f"{made.bits_per_weight:.2f}" if made.bits_per_weight else ""
        seconds = f"{made.seconds:.1f}" if stop.fresh else "was there"
        table.add_row(made.name, made.type, bits, decimal(made.seen.size), seconds, made.seen.sha256)
    table.columns[0].no_wrap = True
    table.columns[-1].overflow = "fold"
    Console().print(table)
