"""Phi-3-mini checkpoints of the real size with random weights, converted and quantised, each step with its time.

Speed and memory depend on shapes and types and not on values: random weights serve as well as trained ones, and need no
download.
"""

import functools
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import Steps
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from tests.support.models import make_128k, write_random_checkpoint

VARIANTS = ("4k", "128k")
KINDS = ("F16", "Q8_0", "Q4_K_M")


def model(options: Options, variant: str, kind: str) -> Path:
    """Return the path of a model, there or not."""
    return options.work / "models" / f"phi-3-mini-{variant}-{kind}.gguf"


def checkpoint(options: Options, variant: str) -> Path:
    """Return the folder of a checkpoint, there or not."""
    return options.work / "models" / f"phi-3-mini-{variant}"


def make_models(steps: Steps, options: Options) -> None:
    """Write both checkpoints, convert them, and quantise them."""
    for variant in VARIANTS:
        if steps.run(f"models.{variant}.checkpoint", functools.partial(_write, options, variant)) is None:
            return
        for kind in KINDS:
            if steps.run(f"models.{variant}.{kind}", functools.partial(_make, options, variant, kind)) is None:
                return


def _write(options: Options, variant: str) -> dict[str, Any]:
    """Write a checkpoint shard by shard in bfloat16; the 128k one shares the weights of the 4k one."""
    folder = checkpoint(options, variant)
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    if variant == "4k":
        write_random_checkpoint(unfinished, "18m" if options.small else "phi-3-mini", shards=2)
    else:
        shutil.copytree(checkpoint(options, "4k"), unfinished, copy_function=os.link)
        make_128k(unfinished / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return {"bytes": _size(folder)}


def _make(options: Options, variant: str, kind: str) -> dict[str, Any]:
    path = model(options, variant, kind)
    if kind == "F16":
        convert(checkpoint(options, variant), path, outtype="f16", force=True)
    else:
        quantize(model(options, variant, "F16"), path, type=kind, force=True)
    return {"bytes": path.stat().st_size}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
