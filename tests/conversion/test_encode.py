"""Encoded values are those of gguf's reference functions, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from gguf import quants
from numpy.typing import NDArray

from edge_phi3.conversion.encode import encode, tensor_type
from edge_phi3.conversion.errors import CheckpointError, ConversionError

MATRIX_TYPES = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0)


def every_finite(dtype: str, below: float = np.inf) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Every 16-bit value that is finite and smaller than `below`: its bits, and the values as float32."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = (
        bits.view(np.float16).astype(np.float32)
        if dtype == "F16"
        else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    )
    kept = np.isfinite(values) & (np.abs(values) < below)
    count = int(kept.sum()) // 32 * 32
    return bits[kept][:count], values[kept][:count]


def reference(values: NDArray[np.float32], target: GgmlType) -> bytes:
    with np.errstate(all="ignore"):
        return quants.quantize(values.reshape(1, -1), target).tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("target", MATRIX_TYPES)
def test_every_16_bit_value_is_encoded_as_by_the_reference(dtype: str, target: GgmlType) -> None:
    largest = {GgmlType.F16: 65520.0, GgmlType.Q8_0: 127 * 65504.0}.get(target, np.inf)
    bits, values = every_finite(dtype, largest)
    assert encode(bits, dtype, target, name="x").tobytes() == reference(values, target)


@pytest.mark.parametrize("target", MATRIX_TYPES)
def test_float32_values_are_encoded_as_by_the_reference(target: GgmlType) -> None:
    generator = np.random.default_rng(0)
    scales = 10.0 ** generator.integers(-8, 4, 200_000 // 32).repeat(32)
    values = (generator.standard_normal(200_000) * scales).astype(np.float32)
    values[::97] = 0.0
    values[:32] = 0.0
    values[32:64] = [127.0] + [k + 0.5 for k in range(31)]  # ties of Q8_0
    assert encode(values, "F32", target, name="x").tobytes() == reference(values, target)


def test_a_value_that_needs_no_change_is_not_copied() -> None:
    values = np.ones(64, np.float32)
    assert encode(values, "F32", GgmlType.F32, name="x") is values


@pytest.mark.parametrize("target", MATRIX_TYPES)
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        ("F32", np.nan),
        ("F32", np.inf),
        ("F32", -np.inf),
        ("F16", 0x7C00),
        ("F16", 0xFE01),
        ("BF16", 0xFF80),
        ("BF16", 0x7FC1),
    ],
)
def test_nan_and_infinity_are_refused(dtype: str, bad: float, target: GgmlType) -> None:
    values: NDArray[Any] = np.zeros(70_016, np.float32 if dtype == "F32" else np.uint16)
    values[70_000] = bad
    with pytest.raises(CheckpointError, match=r"blk\.weight has NaN or infinite values"):
        encode(values, dtype, target, name="blk.weight")


@pytest.mark.parametrize(
    ("dtype", "large", "target", "outtype"),
    [
        ("F32", 65520.0, GgmlType.F16, "f16"),
        ("F32", -1e30, GgmlType.F16, "f16"),
        ("BF16", 0x4780, GgmlType.F16, "f16"),
        ("F32", 1e7, GgmlType.Q8_0, "q8_0"),
        ("BF16", 0xFF7F, GgmlType.Q8_0, "q8_0"),
    ],
)
def test_a_value_too_large_for_the_type_is_refused(dtype: str, large: float, target: GgmlType, outtype: str) -> None:
    values: NDArray[Any] = np.zeros(64, np.float32 if dtype == "F32" else np.uint16)
    values[3] = large
    with pytest.raises(ConversionError, match=f"x has values too large for {outtype}; convert to bf16 or f32"):
        encode(values, dtype, target, name="x")


def test_the_largest_value_of_float16_is_not_too_large() -> None:
    values = np.full(32, 65519.0, np.float32)
    assert encode(values, "F32", GgmlType.F16, name="x").view(np.float16).max() == 65504.0


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_qkv.weight", (96, 64), GgmlType.Q8_0),
        ("blk.0.ffn_down.weight", (64, 72), GgmlType.F16),
        ("blk.0.attn_norm.weight", (64,), GgmlType.F32),
        ("output_norm.weight", (64,), GgmlType.F32),
        ("rope_factors_long.weight", (8,), GgmlType.F32),
        ("token_embd.weight", (672, 64), GgmlType.Q8_0),
    ],
)
def test_vectors_stay_float32_and_rows_of_no_whole_blocks_become_float16(
    name: str, shape: tuple[int, ...], expected: GgmlType
) -> None:
    assert tensor_type(name, shape, GgmlType.Q8_0) == expected
