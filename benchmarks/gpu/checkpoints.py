"""Phi-3-mini checkpoints of the real size with random weights, converted and quantised, each step with its time.

Speed and memory depend on shapes and types and not on values: random weights serve as well as trained ones, and need no
download.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import Steps
from benchmarks.models import PHI3_VOCABULARY_ROWS
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from tests.golden.checkpoints import longrope, write_checkpoint
from tests.golden.vocabularies import phi3_vocabulary

VARIANTS = ("4k", "128k")
KINDS = ("F16", "Q8_0", "Q4_K_M")

# https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json, and the same of a few megabytes.
_SHAPES: dict[bool, dict[str, int]] = {
    False: {"hidden_size": 3072, "intermediate_size": 8192, "heads": 32, "layers": 32, "shards": 2},
    True: {"hidden_size": 256, "intermediate_size": 512, "heads": 4, "layers": 1, "shards": 2},
}


def model(options: Options, variant: str, kind: str) -> Path:
    """Give the path of a model, there or not."""
    return options.work / "models" / f"phi-3-mini-{variant}-{kind}.gguf"


def checkpoint(options: Options, variant: str) -> Path:
    """Give the folder of a checkpoint, there or not."""
    return options.work / "models" / f"phi-3-mini-{variant}"


def make_models(steps: Steps, options: Options) -> None:
    """Write both checkpoints, convert them, and quantise them."""
    for variant in VARIANTS:
        if steps.run(f"models.{variant}.checkpoint", lambda v=variant: _write(options, v)) is None:
            return
        for kind in KINDS:
            if steps.run(f"models.{variant}.{kind}", lambda v=variant, k=kind: _make(options, v, k)) is None:
                return


def _write(options: Options, variant: str) -> dict[str, Any]:
    """Write a checkpoint shard by shard in bfloat16; the 128k one shares the weights of the 4k one."""
    folder = checkpoint(options, variant)
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    if variant == "4k":
        shape = _SHAPES[options.small]
        write_checkpoint(
            unfinished, vocabulary=phi3_vocabulary(), vocab_size=PHI3_VOCABULARY_ROWS, dtype="bfloat16", **shape
        )
    else:
        shutil.copytree(checkpoint(options, "4k"), unfinished, copy_function=os.link)
        _make_128k(unfinished / "config.json")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return {"bytes": _size(folder)}


def _make_128k(config: Path) -> None:
    """Change a 4k checkpoint's configuration to that of the 128k one: all that tells them apart but the weights."""
    values = json.loads(config.read_text(encoding="utf-8"))
    head_size = values["hidden_size"] // values["num_attention_heads"]
    values |= {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": longrope(head_size),
        "sliding_window": 262144,
    }
    config.unlink()  # a hard link: the 4k checkpoint's own must not change
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _make(options: Options, variant: str, kind: str) -> dict[str, Any]:
    path = model(options, variant, kind)
    if kind == "F16":
        convert(checkpoint(options, variant), path, outtype="f16", force=True)
    else:
        quantize(model(options, variant, "F16"), path, type=kind, force=True)
    return {"bytes": path.stat().st_size}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
