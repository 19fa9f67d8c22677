"""``edge-phi3 imatrix``: measures which columns of a model's matrices matter, for quantising it well."""

from pathlib import Path
from typing import Any

import rich_click as click

from edge_phi3.conversion.imatrix import DEFAULT_CHUNK, make_imatrix
from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.errors import WrongUsageError
from edge_phi3.progress import stderr_progress


@click.command("imatrix")
@click.argument("model", type=click.Path(path_type=Path), help="A GGUF file; the better its weights, the better.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The matrix to write (GGUF).")
@click.option(
    "-f", "--file", "text", type=click.Path(path_type=Path), help="Calibration text; a packaged one when not given."
)
@click.option(
    "--ctx-size", type=click.IntRange(min=16), default=DEFAULT_CHUNK, show_default=True, help="Tokens of a chunk."
)
@click.option("--chunks", type=click.IntRange(min=1), help="How many chunks to evaluate at most.")
@click.option(
    "--in-file", "in_files", multiple=True, type=click.Path(path_type=Path), help="A matrix to go on from; repeatable."
)
@click.option("--from-chunk", type=click.IntRange(min=0), default=0, help="How many chunks to skip: those done before.")
@click.option("--save-every", type=click.IntRange(min=1), help="Keep what there is after so many chunks each.")
@click.option(
    "--parse-special/--no-parse-special",
    default=None,
    help="Read <|user|> as a token; by default in the packaged text only.",
)
@click.option("--process-output", is_flag=True, help="Collect for the output matrix too.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--n-gpu-layers", type=int, default=-1, show_default=True, help="Layers on the GPU; -1 for all.")
@click.option("--force", is_flag=True, help="Replace the output when it exists.")
def command(model: Path, output: Path, text: Path | None, in_files: tuple[Path, ...], **options: Any) -> None:
    """Collect an importance matrix, which `edge-phi3 quantize --imatrix` and `llama-quantize --imatrix` read.

    Example: `edge-phi3 imatrix phi-3-mini-4k-f16.gguf -o phi-3-mini-4k.imatrix.gguf`
    """
    if options["from_chunk"] and not in_files:
        raise WrongUsageError("--from-chunk: give the matrix of the chunks that it skips with --in-file.")
    earlier = [read_imatrix(path) for path in in_files]
    with stderr_progress() as progress, progress.step(f"Calibrating {model.name}") as step:
        matrix = make_imatrix(model, output, text=text, earlier=earlier, progress=step.update, **options)
    click.echo(output)
    click.echo(f"{len(matrix.entries)} matrices, {matrix.chunk_count} chunks of {matrix.chunk_size} tokens", err=True)
