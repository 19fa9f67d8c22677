"""Checkpoint values -> GGUF values, with the bytes of llama.cpp's converter.

Every conversion from a 16-bit type to another element type is one look-up in a table of its 65,536 results,
made once by the reference function; that is several times faster than converting. Q8_0 and conversions from
float32 call the reference functions of the ``gguf`` package.
"""

import functools
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from edge_phi3.conversion.errors import CheckpointError, ConversionError

STORED_TYPES = {"F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}
"""The safetensors dtypes of weights that can be converted, and the GGUF type that holds the same values."""

_EXPONENT = {"F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}
_MAGNITUDE = np.uint16(0x7FFF)
_LARGEST_Q8_0 = 127 * 65504.0

# Values converted at once: few enough that the intermediate results stay in a core's cache. A multiple of every
# type's block size.
_BLOCK = 1 << 16


def encoded_size(size: int, target: GgmlType) -> int:
    """Return the bytes that `size` values take in the type `target`."""
    block, block_bytes = GGML_QUANT_SIZES[target]
    return int(size // block * block_bytes)


def tensor_type(name: str, shape: tuple[int, ...], wanted: GgmlType) -> GgmlType:
    """Return the type that a tensor is written in, by the rules of llama.cpp's converter.

    Vectors and norms stay F32; a matrix whose rows are no multiple of the block size of `wanted` falls back to F16.
    """
    if len(shape) <= 1 or name.endswith("_norm.weight"):
        return GgmlType.F32
    if shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        return GgmlType.F16
    return wanted


def encode(values: NDArray[Any], dtype: str, target: GgmlType, *, name: str) -> NDArray[Any]:
    """Return the bytes to write of a tensor's values, contiguous; `values` itself when nothing changes.

    The values have the shape (n,) and are as `StoredTensor.read` gives them; n is a multiple of the block size of
    `target`, which is F32, F16, BF16 or Q8_0.

    Raises:
        CheckpointError: a value is NaN or infinite.
        ConversionError: a value is too large for `target`.
    """
    _refuse_non_finite(values, dtype, name)
    if STORED_TYPES[dtype] == target:
        return values
    encoded = np.empty(encoded_size(len(values), target), np.uint8)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        end = start + len(block)
        out = encoded[encoded_size(start, target) : encoded_size(end, target)]
        if dtype == "F32" or target == GgmlType.Q8_0:
            out[:] = _by_reference(to_float32(block, dtype), target, name)
        else:
            table = _table(dtype, target)
            # "wrap" never wraps here (the table has an entry for every index) and spares a pass of bounds checks.
            np.take(table, block, out=out.view(table.dtype), mode="wrap")
    if target == GgmlType.F16 and (encoded.view(np.uint16) & _MAGNITUDE).max() >= _EXPONENT["F16"]:
        raise _overflow(name, "f16")
    return encoded


def to_float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return values, as `StoredTensor.read` gives them, in float32; nothing is rounded."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.view(np.float16).astype(np.float32) if dtype == "F16" else values


def _by_reference(values: NDArray[np.float32], target: GgmlType, name: str) -> NDArray[np.uint8]:
    if target == GgmlType.Q8_0 and max(values.max(), -values.min()) > _LARGEST_Q8_0:
        raise _overflow(name, "q8_0")
    # Overflow is looked for in the result; a Q8_0 block of numbers next to zero divides by zero and has the scale 0.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        encoded = np.asarray(quants.quantize(values.reshape(1, -1), target))
    return encoded.view(np.uint8).reshape(-1)


def _overflow(name: str, outtype: str) -> ConversionError:
    return ConversionError(f"{name} has values too large for {outtype}; convert to bf16 or f32.")


def _refuse_non_finite(values: NDArray[Any], dtype: str, name: str) -> None:
    finite = bool(np.isfinite(values).all()) if dtype == "F32" else bool((values & _MAGNITUDE).max() < _EXPONENT[dtype])
    if not finite:
        raise CheckpointError(f"{name} has NaN or infinite values; such a model cannot answer. Download it again.")


@functools.cache
def _table(dtype: str, target: GgmlType) -> NDArray[Any]:
    every = to_float32(np.arange(1 << 16, dtype=np.uint16), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        table: NDArray[Any] = quants.quantize(every.reshape(1, -1), target)[0]
    return table.view(np.float32 if target == GgmlType.F32 else np.uint16)
