"""The whole journey: a Phi-3 checkpoint is converted, calibrated and quantised, each step only when it is needed.

python scripts/convert_and_quantize.py phi-3-mini-4k-instruct --quant Q4_K_M --quant Q8_0 --output-dir models
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from edge_phi3.catalog import CatalogError
from edge_phi3.catalog.hub import Hub
from edge_phi3.catalog.listing import RemoteFile, small_files, weight_files
from edge_phi3.catalog.reference import HubCheckpoint, LocalCheckpoint, parse_reference
from edge_phi3.conversion.convert import SourceInfo
from edge_phi3.conversion.journey import Stop, run_journey
from edge_phi3.conversion.quantization_types import quantization_type
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.progress import ProgressReporter, stderr_progress


def fetch(
    wanted: HubCheckpoint, folder: Path, quants: Sequence[str], progress: ProgressReporter
) -> tuple[Path, SourceInfo]:
    """Download what is missing of a checkpoint; give its folder, and where it is from.

    Raises:
        CatalogError: the disk has no room for the download, the conversion and the quantised files.
    """
    hub = Hub(progress)
    snapshot = hub.snapshot(wanted.repository, wanted.revision)
    target = folder / f"checkpoint-{snapshot.commit[:12]}"

    def download(files: list[RemoteFile]) -> None:
        for file in files:
            # Files get their name once they have been checked.
            if not (target / Path(file.name).name).exists():
                hub.download(snapshot, file, target / Path(file.name).name)

    download(small_files(snapshot))
    weights = weight_files(snapshot, target)
    missing = [file for file in weights if not (target / Path(file.name).name).exists()]
    if missing:
        total = sum(file.size or 0 for file in weights)
        # The checkpoints are published in 16 bits a weight; the conversion is as large as they are.
        outputs = total + sum(int(total * quantization_type(quant).bits_per_weight / 16) for quant in set(quants))
        needed, free = outputs + sum(file.size or 0 for file in missing), shutil.disk_usage(folder).free
        if free < needed:
            raise CatalogError(
                f"{wanted.text} and what is made of it take about {decimal(needed)}, and the disk of {folder} has"
                f" {decimal(free)} left; free some space, or choose another --output-dir."
            )
    download(weights)
    return target, SourceInfo(snapshot.repository, snapshot.commit)


def show(stops: list[Stop]) -> Table:
    """Draw the files as a table."""
    table = Table("file", "type", "bits per weight", "size", "seconds", "sha256", box=None)
    for stop in stops:
        made = stop.made
        bits = f"{made.bits_per_weight:.2f}" if made.bits_per_weight else ""
        seconds = f"{made.seconds:.1f}" if stop.fresh else "was there"
        table.add_row(made.name, made.type, bits, decimal(made.seen.size), seconds, made.seen.sha256)
    table.columns[0].no_wrap = True
    table.columns[-1].overflow = "fold"
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", help="A checkpoint folder, a preset's name, or a Hub repository (OWNER/NAME[@REVISION]).")
@click.option("--quant", "quants", multiple=True, default=["Q4_K_M"], show_default=True, help="A type; repeatable.")
@click.option("--output-dir", type=click.Path(path_type=Path, file_okay=False), required=True, help="Where files go.")
@click.option(
    "--imatrix", default="auto", show_default=True, metavar="auto|none|FILE", help="The importance matrix to use."
)
@click.option("--imatrix-chunks", type=click.IntRange(min=1), help="Chunks of calibration text at most.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print the files as JSON.")
def main(checkpoint: str, output_dir: Path, *, quants: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Convert and quantise a checkpoint; run it again after an interruption, and it goes on."""
    source = None
    with stderr_progress() as progress:
        wanted = parse_reference(checkpoint)
        if isinstance(wanted, HubCheckpoint):
            folder, source = fetch(wanted, output_dir, quants, progress)
        elif isinstance(wanted, LocalCheckpoint):
            folder = wanted.path
        else:
            raise click.UsageError(f"{checkpoint} is a GGUF already; quantise it with `edge-phi3 quantize`.")
        stops = run_journey(
            folder,
            quants,
            output_dir,
            name=wanted.name.rsplit("/", 1)[-1],
            source=source,
            progress=progress,
            **options,
        )
    if as_json:
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
        click.echo(msgspec.json.format(msgspec.json.encode(rows)))
    else:
        Console().print(show(stops))


if __name__ == "__main__":
    try:
        main()
    except EdgePhi3Error as error:
        click.echo(f"convert_and_quantize: {error}", err=True)
        raise SystemExit(1) from None
