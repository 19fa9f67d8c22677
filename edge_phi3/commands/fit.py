"""``edge-phi3 fit``: which quantisations of a model fit a machine's memory."""

import dataclasses
import shlex
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pydantic
import rich_click as click
from rich.console import Console
from rich.table import Table

from edge_phi3.catalog.reference import LocalGguf, parse_reference
from edge_phi3.commands.serve import option_of, settings_of
from edge_phi3.errors import WrongUsageError
from edge_phi3.llama import PlanningError
from edge_phi3.llama.memory import devices
from edge_phi3.options import flag_of
from edge_phi3.planning.fit import Fit, Machine, Options, Row, fit
from edge_phi3.planning.gguf_layout import Memory
from edge_phi3.planning.source import find_base
from edge_phi3.progress import stderr_progress
from edge_phi3.settings import Settings
from edge_phi3.system_resources import available_memory, gpus

_MIB = 1 << 20
_OPTIONS = tuple(field.name for field in dataclasses.fields(Options))


def _size(_ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return int(pydantic.TypeAdapter(pydantic.ByteSize).validate_python(value))
    except pydantic.ValidationError:
        raise click.BadParameter(
            f"{value!r} is not a size; give one such as 8GiB or 512MiB.", param=parameter
        ) from None


def _machine(device: str, memory: int | None, reserve: int) -> Machine:
    found = gpus()
    # NVML knows NVIDIA's GPUs alone; llama.cpp may have been built for others, and would lay layers on them.
    others = devices() if not found and (device == "auto" or (device == "gpu" and memory is None)) else []
    gpu = device == "gpu" or (device == "auto" and bool(found or others))
    if memory is not None:
        name = "a GPU" if gpu else "a machine without a GPU"
        return Machine(gpu, f"{name} with {_mib(memory)} MiB free", memory, reserve)
    if not gpu:
        free = available_memory()
        return Machine(False, f"this machine's CPU, {_mib(free)} MiB free", free, reserve)
    if not (found or others):
        raise WrongUsageError("--device gpu: there is no GPU here; describe one with --memory, as in --memory 8GiB.")
    # NVIDIA's first GPU is planned for, and the command names it; llama.cpp spreads the layers over all of the others.
    chosen = found[:1] or others
    free, total = sum(one.free for one in chosen), sum(one.total for one in chosen)
    name = f"{' and '.join(one.name for one in chosen)}, {_mib(free)} of {_mib(total)} MiB free"
    shared = any(one.shares_main_memory for one in others)
    visible = str(found[0].index) if len(found) > 1 else None
    return Machine(True, name, free, reserve, main_memory=None if shared else available_memory(), visible=visible)


def _mib(count: int) -> str:
    return f"{count / _MIB:,.1f}"


def _short(count: int) -> str:
    # Tenths only of small sizes, of which they are more than a thousandth.
    return _mib(count) if count < 100 * _MIB else f"{count / _MIB:,.0f}"


def _table(answer: Fit, rows: list[Row]) -> Table:
    on_gpu, all_fit = answer.machine.gpu, all(row.fits for row in rows)
    table = Table(box=None)
    heads = ["type", "bits", "weights", "KV cache", "compute", *([] if on_gpu else ["output"]), "total"]
    heads += [*(["layers", "host"] if on_gpu else []), "matrix", *([] if all_fit else ["fits"])]
    for head in heads:
        table.add_column(head, justify="left" if head in {"type", "matrix", "fits"} else "right", no_wrap=True)
    for row in rows:
        memory = row.placement.device if on_gpu else row.placement.host
        sizes = [memory.weights, memory.kv_cache, memory.compute, *([] if on_gpu else [memory.output]), memory.total]
        cells = [row.type, f"{row.bits_per_weight:.2f}", *map(_short, sizes)]
        if on_gpu:
            cells += [f"{row.placement.layers} of {answer.layers}", _short(row.placement.host.total)]
        cells.append("needed" if row.needs_imatrix else "")
        cells += [] if all_fit else ["yes" if row.fits else "no"]
        table.add_row(*cells, style="bold" if row is answer.best else None)
    return table


def _commands(model: str, answer: Fit, store: Path | None) -> list[str]:
    best = answer.best
    if best is None:
        return []
    make: list[str] = []
    reference = parse_reference(model)
    if best.needs_imatrix:
        make = ["pull", model, "--quant", best.type, "--imatrix", "auto", "--output-dir", "models"]
        parts = [f"models/{reference.name.rsplit('/', 1)[-1]}-{best.type}.gguf"]
    elif isinstance(reference, LocalGguf) and not best.made:
        output = str(reference.path.with_name(f"{reference.path.stem}-{best.type}.gguf"))
        make, parts = ["quantize", model, "-o", output, "--type", best.type], [output]
    elif isinstance(reference, LocalGguf):
        parts = [model]
    else:
        parts = [model, "--quant", best.type, *(["--store", str(store)] if store else [])]
    for name in _OPTIONS:
        value = getattr(answer.options, name)
        if name == "n_gpu_layers" and best.placement.layers not in {None, answer.layers}:
            value = best.placement.layers
        if value != Settings.model_fields[name].default:
            parts += [flag_of(name), str(value)]
    visible = f"CUDA_VISIBLE_DEVICES={answer.machine.visible} " if answer.machine.visible else ""
    before = [shlex.join(["edge-phi3", *make])] if make else []
    return [*before, f"{visible}edge-phi3 serve {shlex.join(parts)}"]


def _json(model: str, answer: Fit, commands: list[str]) -> bytes:
    def parts(memory: Memory) -> dict[str, int]:
        return dataclasses.asdict(memory) | {"total": memory.total}

    machine = answer.machine
    rows = [
        {
            "type": row.type,
            "bits_per_weight": round(row.bits_per_weight, 3),
            "needs_imatrix": row.needs_imatrix,
            "fits": row.fits,
            "layers_on_gpu": row.placement.layers,
            "gpu": parts(row.placement.device) if machine.gpu else None,
            "main_memory": parts(row.placement.host),
        }
        for row in answer.rows
    ]
    whole = {
        "model": model,
        "options": answer.options,
        "machine": {"gpu": machine.gpu, "name": machine.name, "free": machine.free, "reserve": machine.reserve},
        "layers": answer.layers,
        "contexts": answer.cells,
        "gpu_buffers_from_gpu": answer.gpu_asked,
        "types": rows,
        "recommended": {"type": answer.best.type, "commands": commands} if answer.best else None,
    }
    return msgspec.json.format(msgspec.json.encode(whole), indent=2)


def _explain(answer: Fit, *, all_rows: bool) -> None:
    machine = answer.machine
    cells = " + ".join(f"{count:,}" for count in answer.cells)
    lines = [
        f"For {machine.name}, of which {_mib(machine.reserve)} are kept free (--reserve); context of {cells} tokens"
        f" for up to {answer.options.parallel} sequences at once. All sizes in MiB; bits are those of a weight."
    ]
    if machine.gpu and not answer.gpu_asked:
        lines.append("llama.cpp here has no GPU to ask: compute buffers are those of its CPU backend, as an estimate.")
    if machine.gpu:
        lines.append("layers are those on the GPU; host is what the rest takes of main memory.")
    hidden = sum(not row.fits for row in answer.rows)
    if hidden and not all_rows:
        lines.append(f"{hidden} of {len(answer.rows)} do not fit; --all shows them too.")
    click.echo("\n".join(lines), err=True)


@click.command("fit", params=[option_of(name, panel="As for serve") for name in _OPTIONS])
@click.argument("model", help="What serve takes: a preset, a Hub repository, a checkpoint, a GGUF file.")
@click.option(
    "--device",
    type=click.Choice(["auto", "gpu", "cpu"]),
    default="auto",
    show_default=True,
    help="Plan for a GPU, or without one; auto takes the GPU that this machine has.",
    panel="Machine",
)
@click.option(
    "--memory",
    callback=_size,
    metavar="SIZE",
    help="Plan for another machine with this much free memory (of its GPU, or main memory), as in 8GiB.",
    panel="Machine",
)
@click.option(
    "--reserve",
    callback=_size,
    default="512MiB",
    show_default=True,
    metavar="SIZE",
    help="Memory to leave for what is not planned: Python, the driver's own, working space of kernels.",
    panel="Machine",
)
@click.option("--quant", multiple=True, metavar="TYPE", help="Plan for this type only; repeatable.", panel="Output")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="EDGE_PHI3_STORE",
    metavar="DIR",
    help="The folder of converted models; by default in the user's cache folder.",
    panel="Machine",
)
@click.option("--all", "all_rows", is_flag=True, help="Show what does not fit, too.", panel="Output")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.", panel="Output")
def command(
    model: str,
    *,
    quant: tuple[str, ...],
    device: str,
    memory: int | None,
    reserve: int,
    store: Path | None,
    all_rows: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Show which quantisations of a model fit a machine's memory, and how to serve the best.

    Weights are not needed: presets are known, of a Hub repository only its config.json is downloaded.

    Example: `edge-phi3 fit phi-3-mini-4k-instruct --ctx-size 8192`

    Another: `edge-phi3 fit phi-3-mini-128k-instruct --device gpu --memory 8GiB --ctx-size 32768 --kv-cache-type q8_0`
    """
    settings = settings_of(flags)
    options = Options(**{name: getattr(settings, name) for name in _OPTIONS})
    machine = _machine(device, memory, reserve)
    with stderr_progress() as progress, tempfile.TemporaryDirectory(prefix="edge-phi3-fit-") as folder:
        base = find_base(model, Path(folder), store=store, progress=progress)
        answer = fit(base, options, machine, quant)
    commands = _commands(model, answer, store)
    if as_json:
        click.echo(_json(model, answer, commands))
    else:
        rows = [row for row in answer.rows if row.fits or all_rows]
        if rows:
            console = Console()
            # A file or a pipe has no width, and cut figures are of no use to it.
            console.width = console.width if console.is_terminal else max(console.width, 100)
            console.print(_table(answer, rows))
        _explain(answer, all_rows=all_rows)
        if commands:
            click.echo("Recommended:", err=True)
        for command_line in commands:
            click.echo(command_line)
    if answer.best is None:
        raise PlanningError(
            f"Nothing fits into {_mib(machine.budget)} MiB; lower --ctx-size or --batch-size, or choose"
            " --kv-cache-type q8_0."
        )
