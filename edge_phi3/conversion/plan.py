"""Which tensors the output will have, of which types, and their bytes: those of llama.cpp's converter.

As in transformers 5, an ``lm_head.weight`` that is stored beside the embedding and differs from it is a matrix of its
own, whatever ``tie_word_embeddings`` says; transformers 4 put the embedding in its place.
"""

import collections
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from edge_phi3.conversion import CheckpointError, ConversionError, UnsupportedModelError
from edge_phi3.conversion.checkpoint import Checkpoint, StoredTensor, some
from edge_phi3.conversion.phi3 import EMBEDDING, HEAD, Phi3, read_phi3
from edge_phi3.conversion.vocabulary import added_texts

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""The output types: of the matrices; ``auto`` is the checkpoint's own."""

STORED_TYPES = {"F32": GgmlType.F32, "F16": GgmlType.F16, "BF16": GgmlType.BF16}
"""The safetensors dtypes of weights that can be converted, and the GGUF type that holds the same values."""

_EXPONENT = {"F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}
_MAGNITUDE = np.uint16(0x7FFF)
_LARGEST_Q8_0 = 127 * 65504.0

# Values converted at once: few enough that the intermediate results stay in a core's cache. A multiple of every
# type's block size.
_BLOCK = 1 << 16

_CHAT_TOKENS = ({"<|user|>", "<|assistant|>", "<|end|>"}, {"<|im_sep|>", "<|im_end|>"})
"""Tokens that only Phi-3, or Phi-4, has all of."""
_QUANTISED_TYPES = ("I8", "U8", "I32", "U32", "F8", "F4", "I4", "U4")
_QUANTISED_PARTS = frozenset({
    "SCB", "weight_format", "absmax", "quant_map", "nested_absmax", "quant_state", "qweight", "qzeros", "scales",
    "g_idx", "weight_scale", "input_scale", "weight_scale_inv", "weight_packed", "weight_zero_point", "codes",
    "codebooks",
})  # fmt: skip

# Values that are compared at once.
_CHUNK = 1 << 20


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


class PlannedTensor(NamedTuple):
    """One tensor of the output, rows first; its values are those of stored ones in turn, or what is to be written."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    values: tuple[StoredTensor, ...] | NDArray[Any]

    @property
    def size(self) -> int:
        """Bytes in the output."""
        return encoded_size(math.prod(self.shape), self.type)


class Plan(NamedTuple):
    """The type of the output's matrices, and its tensors in their order."""

    matrices: GgmlType
    tensors: list[PlannedTensor]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def weights(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def read_model(checkpoint: Checkpoint) -> Phi3:
    """Return the hyper-parameters of a checkpoint, untied where its own output matrix is not the embedding."""
    split = any(name.endswith(".q_proj.weight") for name in checkpoint.tensors)
    added = added_texts(checkpoint.folder) if split else set()
    model = read_phi3(checkpoint.config, disguised=any(tokens <= added for tokens in _CHAT_TOKENS))
    notes = _check_quantization(checkpoint.config, checkpoint.tensors)
    embedding, head = checkpoint.tensors.get(EMBEDDING), checkpoint.tensors.get(HEAD)
    tied = model.tie_word_embeddings
    if tied and embedding is not None and head is not None and not _are_equal(embedding, head):
        tied = False
        notes += (
            f"config.json: tie_word_embeddings is true, but {HEAD} is stored and differs from {EMBEDDING}; "
            "both are kept, as in transformers 5.",
        )
    return msgspec.structs.replace(model, tie_word_embeddings=tied, notes=notes)


def _check_quantization(config: dict[str, Any], tensors: dict[str, StoredTensor]) -> tuple[str, ...]:
    """Refuse quantised weights; return a sentence when only ``config.json`` still speaks of them."""
    stated = config.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    for name, stored in tensors.items():
        of_integers = stated and stored.dtype.startswith(_QUANTISED_TYPES)
        if of_integers or not _QUANTISED_PARTS.isdisjoint(name.split(".")):
            raise UnsupportedModelError(
                f"The checkpoint is quantised already{f' ({method})' if method else ''}: {stored.name} has the dtype "
                f"{stored.dtype}. Convert the model that it was made from, or load it with transformers, call its "
                "dequantize(), and save_pretrained() again."
            )
    if not stated:
        return ()
    how = f" ({method})" if method else ""
    return (f"config.json has a quantization_config{how}, but no weight is quantised; it has no effect.",)


def plan_tensors(tensors: dict[str, StoredTensor], model: Phi3, outtype: str) -> Plan:
    """Plan the output of a checkpoint's tensors."""
    specs = model.tensors()
    # Savers that store tied matrices once keep either name.
    tied, renamed = model.tie_word_embeddings, EMBEDDING not in tensors
    stored = {
        EMBEDDING if tied and name == HEAD else name: tensor
        for name, tensor in tensors.items()
        if not tied or name != HEAD or renamed
    }
    # Of each tensor of the model, the stored ones that it is made of, and their shapes.
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, spec in specs.items():
        split = name not in stored and not spec.parts.keys().isdisjoint(stored)
        parts[name] = (
            {part: (rows, *spec.shape[1:]) for part, rows in spec.parts.items()} if split else {name: spec.shape}
        )
    expected = {part: shape for shapes in parts.values() for part, shape in shapes.items()}
    if missing := sorted(expected.keys() - stored.keys()):
        raise CheckpointError(f"The checkpoint lacks {some(missing)}; a shard may be missing.")
    if surplus := sorted(stored.keys() - expected.keys()):
        raise CheckpointError(
            f"The checkpoint has {some(surplus)}, which a {model.num_hidden_layers}-layer Phi-3 lacks."
        )
    for name, tensor in stored.items():
        if tensor.shape != expected[name]:
            hint = "" if tensor.size else "; DeepSpeed left it so, and its zero_to_fp32.py makes the weights"
            raise CheckpointError(
                f"{name} has the shape {list(tensor.shape)}, but config.json asks for {list(expected[name])}{hint}."
            )
        if tensor.dtype not in STORED_TYPES:
            raise CheckpointError(
                f"{name} has the dtype {tensor.dtype}; BF16, F16 and F32 can be converted, not what is quantised."
            )
    wanted = matrix_type(stored, outtype)
    planned = []
    if longrope := model.rope.longrope:
        for kind, factor in (("long", longrope.long_factor), ("short", longrope.short_factor)):
            planned.append(PlannedTensor(f"rope_factors_{kind}.weight", factor.shape, GgmlType.F32, factor))
    # In the order of the files; a tensor in parts stands where the first of them does.
    whole = {part: name for name, shapes in parts.items() for part in shapes}
    for name in dict.fromkeys(whole[part] for part in stored):
        spec, values = specs[name], tuple(stored[part] for part in parts[name])
        planned.append(PlannedTensor(spec.name, spec.shape, tensor_type(spec.name, spec.shape, wanted), values))
    return Plan(wanted, planned)


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or not {one.dtype, other.dtype} <= STORED_TYPES.keys():
        return False
    for start in range(0, one.size, _CHUNK):
        stop = min(start + _CHUNK, one.size)
        left, right = one.read(start, stop), other.read(start, stop)
        same = one.dtype == other.dtype and left.tobytes() == right.tobytes()
        # Two types of elements may hold the same values.
        if not same and not np.array_equal(to_float32(left, one.dtype), to_float32(right, other.dtype)):
            return False
        for tensor in (one, other):
            tensor.drop(start, stop)
    return True


def matrix_type(stored: Mapping[str, StoredTensor], outtype: str) -> GgmlType:
    """Return the type of the output's matrices: `outtype`, or for ``auto`` that of most stored ones."""
    if outtype not in OUTTYPES:
        raise ConversionError(f"The output type {outtype!r} does not exist; choose one of {', '.join(OUTTYPES)}.")
    if outtype != "auto":
        return GgmlType[outtype.upper()]
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.size if len(tensor.shape) > 1 else 0
    return STORED_TYPES[sizes.most_common(1)[0][0]]


def encode(values: NDArray[Any], dtype: str, target: GgmlType, *, name: str) -> NDArray[Any]:
    """Return the bytes to write of a tensor's values, contiguous; `values` itself when nothing changes.

    The values have the shape (n,) and are as `StoredTensor.read` gives them; n is a multiple of the block size of
    `target`, which is F32, F16, BF16 or Q8_0. `CheckpointError` is a value that is NaN or infinite, `ConversionError`
    one that is too large for `target`.
    """
    finite = np.isfinite(values).all() if dtype == "F32" else (values & _MAGNITUDE).max() < _EXPONENT[dtype]
    if not finite:
        raise CheckpointError(f"{name} has NaN or infinite values; such a model cannot answer. Download it again.")
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


# A look-up in the 65,536 results of a conversion from 16 bits is several times faster than converting.
@functools.cache
def _table(dtype: str, target: GgmlType) -> NDArray[Any]:
    every = to_float32(np.arange(1 << 16, dtype=np.uint16), dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        table: NDArray[Any] = quants.quantize(every.reshape(1, -1), target)[0]
    return table.view(np.float32 if target == GgmlType.F32 else np.uint16)
