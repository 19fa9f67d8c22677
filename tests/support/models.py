"""Models for benchmarks and comparisons: made from a seed the first time, and kept in a cache folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.golden.checkpoints import long_context, write_checkpoint
from tests.golden.vocabularies import phi3_vocabulary
from tests.support.peers import CACHE

PHI3_VOCABULARY_ROWS = 32064

SHAPES: dict[str, dict[str, int]] = {
    # https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json: 3.8 billion weights.
    "phi-3-mini": {"hidden_size": 3072, "intermediate_size": 8192, "heads": 32, "layers": 32},
    # The same widths with 4 of its 32 layers: 0.65 billion weights.
    "0.65b": {"hidden_size": 3072, "intermediate_size": 8192, "heads": 32, "layers": 4},
    # The same widths in a single layer, for work on the weights themselves: 0.31 billion weights.
    "wide": {"hidden_size": 3072, "intermediate_size": 8192, "heads": 32, "layers": 1},
    # A third of the widths: 0.12 billion weights.
    "0.12b": {"hidden_size": 1024, "intermediate_size": 2816, "heads": 16, "layers": 4},
    # So small that what surrounds the matrices shows: 18 million weights, 16 of them in the vocabulary.
    "18m": {"hidden_size": 256, "intermediate_size": 512, "heads": 4, "layers": 2},
}
"""Random checkpoints with Phi-3's whole vocabulary, by name."""


def model_path(name: str, folder: Path = CACHE, kind: str | None = None) -> Path:
    """Return a model's GGUF, made when it is not there yet.

    Args:
        name: a key of `SHAPES`, or "demo" for the bundled model.
        folder: where models are kept.
        kind: F32, F16, BF16 or a quantisation type; None for what is measured: Q4_K_M, but F32 of the smallest.
    """
    kind = kind or ("F32" if name == "18m" else "Q4_K_M")
    path = folder / f"{name}-{kind}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    plain = kind if kind in {"F32", "F16", "BF16"} else "F16"
    if plain != kind:
        return quantize(model_path(name, folder, plain), path, type=kind).path
    if name == "demo":
        return convert(DEMO_CHECKPOINT, path, outtype=plain.lower()).path
    with random_checkpoint(name, folder, dtype="float32" if plain == "F32" else "bfloat16") as checkpoint:
        return convert(checkpoint, path, outtype=plain.lower()).path


@contextlib.contextmanager
def random_checkpoint(name: str, folder: Path | None = None, dtype: str = "bfloat16") -> Iterator[Path]:
    """Write one of `SHAPES` as a checkpoint, the same each time, for as long as the context lasts."""
    checkpoint = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield write_random_checkpoint(checkpoint, name, dtype=dtype)
    finally:
        shutil.rmtree(checkpoint)


def write_random_checkpoint(folder: Path, name: str, *, dtype: str = "bfloat16", shards: int = 1) -> Path:
    """Write one of `SHAPES` as a checkpoint into `folder`, and return it."""
    options: dict[str, Any] = {"vocabulary": phi3_vocabulary(), "vocab_size": PHI3_VOCABULARY_ROWS, **SHAPES[name]}
    return write_checkpoint(folder, dtype=dtype, shards=shards, **options)


def make_128k(config: Path) -> None:
    """Change a 4k checkpoint's ``config.json`` to that of a 128k one: all that tells them apart but the weights."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values |= long_context(values["hidden_size"] // values["num_attention_heads"])
    config.unlink()  # it may be a hard link, whose other name must not change
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_adapter(path: Path, name: str, down: NDArray[Any], up: NDArray[Any]) -> None:
    """Write a LoRA adapter of one tensor."""
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(len(down)))
    writer.add_tensor(f"{name}.lora_a", down.astype(np.float32))
    writer.add_tensor(f"{name}.lora_b", up.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
