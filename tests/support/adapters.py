"""LoRA adapters as GGUF files, small and random."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

RANK = 2
Factors = tuple[NDArray[np.float32], NDArray[np.float32]]
"""What a matrix is changed by: A, shape ``(rank, columns)``, and B, shape ``(rows, rank)``."""


def write_adapter(path: Path, factors: Mapping[str, Factors]) -> Path:
    """Write an adapter that adds ``B A`` to each of some matrices of a model."""
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(RANK))
    for name, (down, up) in factors.items():
        writer.add_tensor(f"{name}.lora_a", down)
        writer.add_tensor(f"{name}.lora_b", up)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_adapter(path: Path, model: Path, seed: int) -> Path:
    """Write an adapter, from a seed, that changes each block's queries, keys, values, and its way out."""
    chance, factors = np.random.default_rng(seed), dict[str, Factors]()
    for tensor in gguf.GGUFReader(model).tensors:
        columns, rows = (*tensor.shape.tolist(), 0)[:2]
        if tensor.name.endswith(("attn_qkv.weight", "ffn_down.weight")):
            down, up = chance.standard_normal((RANK, columns)), chance.standard_normal((rows, RANK))
            factors[tensor.name] = ((down / columns**0.5).astype(np.float32), up.astype(np.float32))
    return write_adapter(path, factors)


def adapter_arguments(model: Path, count: int) -> list[str]:
    """Make so many adapters of a model, and return the arguments of ``edge-phi3 serve`` for them, called 1, 2, ..."""
    paths = [model.with_name(f"{model.stem} {number}") for number in range(1, count + 1)]
    made = enumerate((random_adapter(path, model, number) for number, path in enumerate(paths, 1)), 1)
    return [word for number, path in made for word in ("--lora", f"{number}={path}")]
