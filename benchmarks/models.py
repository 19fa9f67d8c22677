"""The models that the benchmarks run on, made from a seed the first time and kept in a cache folder."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.golden.checkpoints import write_checkpoint
from tests.golden.vocabularies import phi3_vocabulary

CACHE = platformdirs.user_cache_path("edge-phi3") / "benchmarks"
"""Where models and peers are kept unless a script is told otherwise."""

PHI3_VOCABULARY_ROWS = 32064

RANDOM_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    # Phi-3-mini's own widths with 4 of its 32 layers: 0.65 billion weights.
    "0.65b": ({"hidden_size": 3072, "intermediate_size": 8192, "heads": 32, "layers": 4}, "Q4_K_M"),
    # The same widths in a single layer, for work on the weights themselves: 0.31 billion weights.
    "wide": ({"hidden_size": 3072, "intermediate_size": 8192, "heads": 32, "layers": 1}, "Q4_K_M"),
    # So small that what surrounds the matrices shows: 18 million weights, 16 of them in the vocabulary.
    "18m": ({"hidden_size": 256, "intermediate_size": 512, "heads": 4, "layers": 2}, "F32"),
}
"""Random checkpoints with Phi-3's whole vocabulary, and the type that each is measured in."""


def model_path(name: str, folder: Path = CACHE, kind: str | None = None) -> Path:
    """Give a model's GGUF, making it when it is not there yet.

    Args:
        name: a key of `RANDOM_MODELS`, or "demo" for the bundled model.
        folder: where models are kept.
        kind: F32, F16, BF16 or a quantisation type; None for the model's own.
    """
    kind = kind or (RANDOM_MODELS[name][1] if name in RANDOM_MODELS else "Q4_K_M")
    path = folder / f"{name}-{kind}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    plain = kind if kind in {"F32", "F16", "BF16"} else "F16"
    if plain != kind:
        quantize(model_path(name, folder, plain), path, type=kind)
        return path
    if name == "demo":
        return convert(DEMO_CHECKPOINT, path, outtype=plain.lower()).path
    with random_checkpoint(name, folder, dtype="float32" if plain == "F32" else "bfloat16") as checkpoint:
        return convert(checkpoint, path, outtype=plain.lower()).path


@contextlib.contextmanager
def random_checkpoint(name: str, folder: Path | None = None, dtype: str = "bfloat16") -> Iterator[Path]:
    """Write one of `RANDOM_MODELS` as a checkpoint, the same each time, for as long as the context lasts."""
    checkpoint = Path(tempfile.mkdtemp(dir=folder))
    try:
        shape, _ = RANDOM_MODELS[name]
        write_checkpoint(
            checkpoint, vocabulary=phi3_vocabulary(), vocab_size=PHI3_VOCABULARY_ROWS, dtype=dtype, **shape
        )
        yield checkpoint
    finally:
        shutil.rmtree(checkpoint)
