"""Which tensors the output will have, of which types: the checkpoint's tensors against those of the model.

As in transformers 5, an ``lm_head.weight`` that is stored beside the embedding and differs from it is a matrix of its
own, whatever ``tie_word_embeddings`` says; transformers 4 put the embedding in its place.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import msgspec
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from edge_phi3.conversion.architecture import check_quantization, has_phi_tokens
from edge_phi3.conversion.checkpoint import Checkpoint, some
from edge_phi3.conversion.encode import STORED_TYPES, encoded_size, tensor_type, to_float32
from edge_phi3.conversion.errors import CheckpointError, ConversionError
from edge_phi3.conversion.phi3 import EMBEDDING, HEAD, Phi3, read_phi3
from edge_phi3.conversion.safetensors import StoredTensor
from edge_phi3.conversion.vocabulary import added_texts

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""The output types: of the matrices; ``auto`` is the checkpoint's own."""

# Values that are compared at once.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: its name there, its shape, rows first, the type that it is written in, its values.

    They are those of stored tensors, one after the other, or made here, as they are to be written.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    values: tuple[StoredTensor, ...] | NDArray[Any]

    @property
    def size(self) -> int:
        """Bytes in the output."""
        return encoded_size(math.prod(self.shape), self.type)


@dataclasses.dataclass(frozen=True)
class Plan:
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
    """Return the hyper-parameters of a checkpoint, untied where its output matrix is not the embedding.

    The two matrices are read, a chunk at a time, when the checkpoint says that they are one and stores both.
    """
    split = any(name.endswith(".q_proj.weight") for name in checkpoint.tensors)
    model = read_phi3(checkpoint.config, disguised=split and has_phi_tokens(added_texts(checkpoint.folder)))
    notes = check_quantization(checkpoint.config, checkpoint.tensors)
    embedding, head = checkpoint.tensors.get(EMBEDDING), checkpoint.tensors.get(HEAD)
    tied = model.tie_word_embeddings
    if tied and embedding is not None and head is not None and not _are_equal(embedding, head):
        tied = False
        notes += (
            f"config.json: tie_word_embeddings is true, but {HEAD} is stored and differs from {EMBEDDING}; "
            "both are kept, as in transformers 5.",
        )
    return msgspec.structs.replace(model, tie_word_embeddings=tied, notes=notes)


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
    """Compare the values, which two element types may hold alike."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= STORED_TYPES.keys():
        return False
    for start in range(0, one.size, _CHUNK):
        stop = min(start + _CHUNK, one.size)
        left, right = one.read(start, stop), other.read(start, stop)
        if one.dtype != other.dtype or left.tobytes() != right.tobytes():
            same = to_float32(left, one.dtype) == to_float32(right, other.dtype)
            if not same.all():
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
