"""``edge-phi3 models``: what the store holds, whether it is as it was made, and less of it."""

import datetime as dt
from pathlib import Path

import rich_click as click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from edge_phi3.catalog import Catalog, CatalogError
from edge_phi3.catalog.manifest import MANIFEST_NAME
from edge_phi3.progress import stderr_progress

_QUANT = click.option("--quant", "quants", multiple=True, metavar="TYPE", help="Of this type only; repeatable.")
STORE = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="EDGE_PHI3_STORE",
    help="The folder of converted models; the user's cache folder when not given.",
)


@click.group("models", invoke_without_command=True)
@STORE
@click.pass_context
def command(ctx: click.Context, store: Path | None) -> None:
    """List the models of the store: their sizes, types, sources, revisions, and when each was last asked for.

    Example: `edge-phi3 models`
    """
    ctx.obj = catalog = Catalog(store)
    if ctx.invoked_subcommand is not None:
        return
    table = Table("model", "type", "size", "source", "revision", "last use", box=None)
    for model in catalog.stored():
        used = model.path.with_name(MANIFEST_NAME).stat().st_mtime
        size, last = _size(model.path.parent), dt.datetime.fromtimestamp(used)  # noqa: DTZ006 - for people
        revision = (model.revision or "")[:12]
        table.add_row(model.name, model.quant or "as published", size, model.source, revision, f"{last:%Y-%m-%d %H:%M}")
    for folder, kind in catalog.leftovers():
        table.add_row(folder.parent.name, kind, _size(folder), folder.name, "", "")
    Console().print(table)


@command.command("rm")
@click.argument("model", help="A model's name or source, as the list shows them.")
@_QUANT
@click.pass_obj
def remove(catalog: Catalog, model: str, quants: tuple[str, ...]) -> None:
    """Delete models of the store, or by its name what is damaged or was left unfinished.

    Example: `edge-phi3 models rm phi-3-mini-4k-instruct --quant Q8_0`
    """
    left = [folder for folder, _ in catalog.leftovers() if folder.parent.name == model]
    with stderr_progress() as progress:
        for folder in left or [stored.path.parent for stored in catalog.called(model, quants)]:
            click.echo(f"{_size(folder)} are free again.", err=True)
            catalog.remove(folder, progress)
            click.echo(folder)


@command.command("verify")
@click.argument("model", required=False, help="A model's name or source; all models when not given.")
@_QUANT
@click.pass_obj
def verify(catalog: Catalog, model: str | None, quants: tuple[str, ...]) -> None:
    """Read models of the store again, and compare them with the digests that were kept when they were made.

    Example: `edge-phi3 models verify`
    """
    left = [folder for folder, kind in catalog.leftovers() if kind == "damaged" and not model]
    damaged = [f"{folder} holds no whole model; `edge-phi3 models rm {folder.parent.name}`." for folder in left]
    for stored in catalog.called(model, quants) if model else catalog.stored():
        before = len(damaged)
        try:
            catalog.verify(stored)
        except CatalogError as error:
            damaged.append(str(error))
        found = "whole" if len(damaged) == before else "damaged"
        click.echo(f"{stored.name} ({stored.quant or stored.path.name}): {found}")
    if damaged:
        raise CatalogError(" ".join(damaged))


def _size(folder: Path) -> str:
    return decimal(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
