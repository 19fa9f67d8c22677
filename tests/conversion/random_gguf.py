"""Phi-3 GGUF files for the quantiser's tests: random weights, or the shapes of a real model without any."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np


def tensor_shapes(
    *, layers: int, hidden: int, feed_forward: int, vocabulary: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name each tensor of a Phi-3 without grouped-query attention, with its shape, rows first."""
    yield "token_embd.weight", (vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (vocabulary, hidden)
    for layer in range(layers):
        yield f"blk.{layer}.attn_norm.weight", (hidden,)
        yield f"blk.{layer}.attn_qkv.weight", (3 * hidden, hidden)
        yield f"blk.{layer}.attn_output.weight", (hidden, hidden)
        yield f"blk.{layer}.ffn_norm.weight", (hidden,)
        yield f"blk.{layer}.ffn_up.weight", (2 * feed_forward, hidden)
        yield f"blk.{layer}.ffn_down.weight", (hidden, feed_forward)


def _writer(
    path: Path, *, layers: int, hidden: int, heads: int, feed_forward: int, vocabulary: int, **options: int
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "phi3", **options)
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    return writer


def write_random(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 256,
    heads: int = 4,
    feed_forward: int = 512,
    vocabulary: int = 384,
    dtype: type[np.floating] = np.float16,
    seed: int = 0,
    split_max_tensors: int = 0,
) -> None:
    """Write a model of random weights; matrices in `dtype`, norms in float32."""
    writer = _writer(
        path,
        layers=layers,
        hidden=hidden,
        heads=heads,
        feed_forward=feed_forward,
        vocabulary=vocabulary,
        split_max_tensors=split_max_tensors,
    )
    random = np.random.default_rng(seed)
    shapes = tensor_shapes(layers=layers, hidden=hidden, feed_forward=feed_forward, vocabulary=vocabulary)
    for name, shape in shapes:
        values = random.normal(size=shape, scale=0.02)
        writer.add_tensor(name, values.astype(dtype if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_phi3_mini_shapes(path: Path) -> None:
    """Write a GGUF with the shapes of Phi-3-mini-4k-instruct in F16, its weights a hole in a sparse file."""
    sizes = {"layers": 32, "hidden": 3072, "feed_forward": 8192, "vocabulary": 32064}
    writer = _writer(path, heads=32, **sizes)
    weights = 0
    for name, shape in tensor_shapes(**sizes):
        dtype = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, size)
        weights += size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        header = path.stat().st_size
        # Each size is a multiple of the alignment (32 bytes), and so the tensors lie without gaps.
        file.truncate(header + -header % 32 + weights)
