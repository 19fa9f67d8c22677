"""``edge-phi3 fit``: which quantisations of a model fit a machine's memory."""

from __future__ import annotations

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
from edge_phi3.commands.errors import WrongUsageError
from edge_phi3.hardware import available_memory, gpus
from edge_phi3.planning.errors import PlanningError
from edge_phi3.planning.fit import Fit, Machine, Options, Row, fit, memory_fields
from edge_phi3.planning.process import Device, devices
from edge_phi3.planning.source import find_base
from edge_phi3.progress import stderr_progress
from edge_phi3.settings import Settings, SettingsError
from edge_phi3.settings_text import choices_of, flag_of

_MIB = 1 << 20
_OPTIONS = tuple(field.name for field in dataclasses.fields(Options))


def _option(name: str) -> click.Parameter:
    """Make the flag of an option that `serve` has too; `Settings` reads its value, from wherever it comes."""
    field = Settings.model_fields[name]
    metavar = "|".join(choices_of(field)) or "INTEGER"
    return click.RichOption(
        [flag_of(name)], metavar=metavar, help=f"{field.description} [default: {field.default}]", panel="As for serve"
    )


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
    """Say where the model is to run.

    Raises:
        WrongUsageError: a GPU is asked for, but there is none, and none is described.
    """
    found = gpus()
    # NVML knows NVIDIA's GPUs alone; llama.cpp may have been built for others, and would lay layers on them.
    others = devices() if not found and (device == "auto" or (device == "gpu" and memory is None)) else []
    gpu = device == "gpu" or (device == "auto" and bool(found or others))
    if memory is not None:
        name = "a GPU" if gpu else "a machine without a GPU"
        return Machine(gpu, f"{name} with {_mib(memory)} MiB free", memory, reserve, visible=None)
    if not gpu:
        free = available_memory()
        return Machine(False, f"this machine's CPU, {_mib(free)} MiB free", free, reserve)
    if others:
        return _other_machine(others, reserve)
    if not found:
        raise WrongUsageError("--device gpu: there is no GPU here; describe one with --memory, as in --memory 8GiB.")
    first = found[0]
    name = f"{first.name}, {_mib(first.free)} of {_mib(first.total)} MiB free"
    # With several GPUs llama.cpp would spread the layers; one is planned for, and the command names it.
    visible = str(first.index) if len(found) > 1 else None
    return Machine(True, name, first.free, reserve, main_memory=available_memory(), visible=visible)


def _other_machine(found: list[Device], reserve: int) -> Machine:
    """Describe GPUs that only llama.cpp knows; it spreads the layers over all of them."""
    free = sum(device.free for device in found)
    name = f"{' and '.join(device.name for device in found)}, {_mib(free)} of"
    name += f" {_mib(sum(device.total for device in found))} MiB free"
    shared = any(device.shares_main_memory for device in found)
    return Machine(True, name, free, reserve, main_memory=None if shared else available_memory())


def _mib(count: int) -> str:
    return f"{count / _MIB:,.1f}"


def _short(count: int) -> str:
    """Give MiB for a column: tenths only of small ones, of which they are more than a thousandth."""
    return f"{count / _MIB:,.1f}" if count < 100 * _MIB else f"{count / _MIB:,.0f}"


def _table(answer: Fit, rows: list[Row]) -> Table:
    on_gpu = answer.machine.gpu
    heads = ["type", "bits", "weights", "KV cache", "compute", *([] if on_gpu else ["output"]), "total"]
    heads += ["layers", "host"] if on_gpu else []
    table = Table(box=None)
    for head in [*heads, "matrix", *([] if all(row.fits for row in rows) else ["fits"])]:
        table.add_column(head, justify="left" if head in {"type", "matrix", "fits"} else "right", no_wrap=True)
    for row in rows:
        memory = row.placement.device if on_gpu else row.placement.host
        cells = [memory.weights, memory.kv_cache, memory.compute, *([] if on_gpu else [memory.output]), memory.total]
        shown = [row.type, f"{row.bits_per_weight:.2f}", *map(_short, cells)]
        if on_gpu:
            shown += [f"{row.placement.layers} of {answer.layers}", _short(row.placement.host.total)]
        shown.append("needed" if row.needs_imatrix else "")
        shown += [] if all(other.fits for other in rows) else ["yes" if row.fits else "no"]
        table.add_row(*shown, style="bold" if row is answer.best else None)
    return table


def _commands(model: str, answer: Fit, store: Path | None) -> list[str]:
    """Give the commands that serve the recommended quantisation as it was planned."""
    best = answer.best
    if best is None:
        return []
    parts = ["edge-phi3", "serve"]
    before = []
    reference = parse_reference(model)
    if best.needs_imatrix:
        pull = ["edge-phi3", "pull", model, "--quant", best.type, "--imatrix", "auto", "--output-dir", "models"]
        before = [shlex.join(pull)]
        name = getattr(reference, "name", model).rsplit("/", 1)[-1]
        parts.append(f"models/{name}-{best.type}.gguf")
    elif isinstance(reference, LocalGguf) and not best.made:
        output = reference.path.with_name(f"{reference.path.stem}-{best.type}.gguf")
        before = [shlex.join(["edge-phi3", "quantize", model, "-o", str(output), "--type", best.type])]
        parts.append(str(output))
    elif isinstance(reference, LocalGguf):
        parts.append(model)
    else:
        parts += [model, "--quant", best.type, *(["--store", str(store)] if store else [])]
    for name in _OPTIONS:
        value = getattr(answer.options, name)
        if name == "n_gpu_layers" and best.placement.layers not in {None, answer.layers}:
            value = best.placement.layers
        if value != Settings.model_fields[name].default:
            parts += [flag_of(name), str(value)]
    visible = f"CUDA_VISIBLE_DEVICES={answer.machine.visible} " if answer.machine.visible else ""
    return [*before, visible + shlex.join(parts)]


def _json(model: str, answer: Fit, commands: list[str]) -> bytes:
    machine = answer.machine
    rows = [
        {
            "type": row.type,
            "bits_per_weight": round(row.bits_per_weight, 3),
            "needs_imatrix": row.needs_imatrix,
            "fits": row.fits,
            "layers_on_gpu": row.placement.layers,
            "gpu": memory_fields(row.placement.device) if machine.gpu else None,
            "main_memory": memory_fields(row.placement.host),
        }
        for row in answer.rows
    ]
    whole = {
        "model": model,
        "options": dataclasses.asdict(answer.options),
        "machine": {"gpu": machine.gpu, "name": machine.name, "free": machine.free, "reserve": machine.reserve},
        "layers": answer.layers,
        "contexts": list(answer.cells),
        "gpu_buffers_from_gpu": answer.gpu_asked,
        "types": rows,
        "recommended": {"type": answer.best.type, "commands": commands} if answer.best else None,
    }
    return msgspec.json.format(msgspec.json.encode(whole), indent=2)


def _explain(answer: Fit, *, all_rows: bool) -> None:
    """Say what the table does not show."""
    machine = answer.machine
    cells = " + ".join(f"{count:,}" for count in answer.cells)
    click.echo(
        f"For {machine.name}, of which {_mib(machine.reserve)} are kept free (--reserve); context of {cells} tokens"
        f" for up to {answer.options.parallel} sequences at once. All sizes in MiB;"
        " bits are those of a weight.",
        err=True,
    )
    if machine.gpu and not answer.gpu_asked:
        click.echo(
            "llama.cpp here has no GPU to ask: compute buffers are those of its CPU backend, as an estimate.", err=True
        )
    if machine.gpu:
        click.echo("layers are those on the GPU; host is what the rest takes of main memory.", err=True)
    hidden = sum(not row.fits for row in answer.rows)
    if hidden and not all_rows:
        click.echo(f"{hidden} of {len(answer.rows)} do not fit; --all shows them too.", err=True)


def _run(
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
    try:
        settings = Settings.load({name: value for name, value in flags.items() if value is not None})
    except SettingsError as error:
        raise WrongUsageError(str(error)) from None
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


command = click.RichCommand(
    name="fit",
    params=[
        click.RichArgument(["model"], help="What serve takes: a preset, a Hub repository, a checkpoint, a GGUF file."),
        *(_option(name) for name in _OPTIONS),
        click.RichOption(
            ["--device"],
            type=click.Choice(["auto", "gpu", "cpu"]),
            default="auto",
            show_default=True,
            help="Plan for a GPU or without; auto takes the GPU that this machine has.",
            panel="Machine",
        ),
        click.RichOption(
            ["--memory"],
            callback=_size,
            metavar="SIZE",
            help="Plan for another machine with so much free memory (of its GPU, or main memory), as in 8GiB.",
            panel="Machine",
        ),
        click.RichOption(
            ["--reserve"],
            callback=_size,
            default="512MiB",
            show_default=True,
            metavar="SIZE",
            help="Memory to leave for what is not planned: Python, the driver's own, working space of kernels.",
            panel="Machine",
        ),
        click.RichOption(
            ["--quant"], multiple=True, metavar="TYPE", help="Plan for this type only; repeatable.", panel="Output"
        ),
        click.RichOption(
            ["--store"],
            type=click.Path(path_type=Path),
            envvar="EDGE_PHI3_STORE",
            metavar="DIR",
            help="The folder of converted models; the user's cache folder when not given.",
            panel="Machine",
        ),
        click.RichOption(["--all", "all_rows"], is_flag=True, help="Show what does not fit, too.", panel="Output"),
        click.RichOption(["--json", "as_json"], is_flag=True, help="Print everything as JSON.", panel="Output"),
    ],
    callback=_run,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Tell which quantisations of a model fit a machine's memory, and how to serve the best.

Weights are not needed: presets are known, of a Hub repository only its config.json is downloaded.

Example: `edge-phi3 fit phi-3-mini-4k-instruct --ctx-size 8192`

Another: `edge-phi3 fit phi-3-mini-128k-instruct --device gpu --memory 8GiB --ctx-size 32768 --kv-cache-type q8_0`
""",
)
"""The verb."""
