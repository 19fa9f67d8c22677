"""``edge-phi3 convert``: a Phi-3 checkpoint, or an adapter, becomes a GGUF file."""

from pathlib import Path

import rich_click as click
from rich.filesize import decimal

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.plan import OUTTYPES
from edge_phi3.progress import stderr_progress


@click.command("convert")
@click.argument(
    "checkpoint",
    type=click.Path(path_type=Path),
    help="A folder in the Hugging Face layout: a model, or a LoRA adapter of PEFT.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The GGUF file to write.")
@click.option(
    "--outtype",
    type=click.Choice(list(OUTTYPES)),
    default="auto",
    show_default=True,
    help="The type of the matrices; auto keeps the checkpoint's own.",
)
@click.option("--force", is_flag=True, help="Replace the output when it exists.")
def command(checkpoint: Path, output: Path, outtype: str, force: bool) -> None:
    """Turn a checkpoint of the Phi family, or a LoRA adapter for one, into a GGUF file, without torch.

    Example: `edge-phi3 convert Phi-3-mini-4k-instruct -o phi-3-mini-4k-f16.gguf --outtype f16`
    """
    with stderr_progress() as progress, progress.step(f"Converting {checkpoint.name}") as step:
        result = convert(checkpoint, output, outtype=outtype, force=force, progress=step.update)
    click.echo(result.path)
    click.echo(
        f"{result.tensors} tensors, {result.outtype}, {decimal(result.size)} in {result.seconds:.1f} s", err=True
    )
