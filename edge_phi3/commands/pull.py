"""``edge-phi3 pull``: brings a model into the store, converted and quantised, without serving it."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from rich.filesize import decimal

from edge_phi3.catalog import Catalog
from edge_phi3.progress import stderr_progress


@click.command("pull", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument(
    "model", help="A preset's name, a Hub repository (OWNER/NAME, OWNER/NAME@REVISION), or a checkpoint folder."
)
@click.option(
    "--quant", default="Q4_K_M", show_default=True, metavar="TYPE", help="The type that a checkpoint is quantised to."
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="EDGE_PHI3_STORE",
    help="The folder of converted models; the user's cache folder when not given.",
)
@click.option("--refresh", is_flag=True, help="Ask the Hub whether there is a newer revision.")
@click.option("--keep-intermediate", is_flag=True, help="Keep the checkpoint, to quantise it again later.")
def command(model: str, quant: str, store: Path | None, refresh: bool, keep_intermediate: bool) -> None:
    """Bring a model into the store: download, convert and quantise what is missing, and print its path.

    Example: `edge-phi3 pull phi-3-mini-4k-instruct --quant Q4_K_M`
    """
    with stderr_progress() as progress:
        stored = Catalog(store).resolve(
            model, quant=quant, progress=progress, refresh=refresh, keep_intermediate=keep_intermediate
        )
    click.echo(stored.path)
    click.echo(f"{stored.name}: {decimal(stored.path.stat().st_size)} from {stored.source}", err=True)
