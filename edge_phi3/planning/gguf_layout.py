"""GGUF files as llama.cpp's loader sees them: hyper-parameters, tensors, and where each lies.

A skeleton is a GGUF whose weights are a hole in a sparse file: it takes a few kilobytes of the disk, and llama.cpp
plans the memory of the model from it as from the real one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from edge_phi3.conversion.encode import encoded_size, tensor_type
from edge_phi3.conversion.imatrix_file import Imatrix, ImatrixEntry, write_imatrix
from edge_phi3.conversion.phi3 import Phi3
from edge_phi3.conversion.quantize import SizePrediction
from edge_phi3.gguf_file import GgufError, GgufFile, TensorInfo, read_gguf, split_files
from edge_phi3.llama import PlanningError
from edge_phi3.llama.model_file import read_model_file

_ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3]
_UNQUANTISED = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

HyperParameter = tuple[str, Any, GGUFValueType]
"""A key of a GGUF, its value, and the type that it is stored in."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a GGUF. `shape` has the rows first; `offset` and `size` are bytes in the file number `file`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    size: int
    offset: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """A model in one or more GGUF files, of which `path` is the first; `hyper_parameters` are the keys of Phi-3."""

    path: Path
    hyper_parameters: tuple[HyperParameter, ...]
    tensors: tuple[Tensor, ...]

    def hyper_parameter(self, name: str) -> int:
        """Return a whole number among the hyper-parameters, 0 when it is absent; ``phi3.`` is left out of its name."""
        found = (value for key, value, _ in self.hyper_parameters if key == f"{_ARCHITECTURE}.{name}")
        return int(next(found, 0))

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return self.hyper_parameter("block_count")

    @property
    def quantised(self) -> bool:
        """Whether a matrix has fewer than 16 bits a weight."""
        return any(tensor.type not in _UNQUANTISED for tensor in self.tensors)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix too."""
        return all(tensor.name != OUTPUT for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return 8 * sum(tensor.size for tensor in self.tensors) / weights


def read_layout(path: Path) -> Layout:
    """Read the header of a model's GGUF, of each file when it is split."""
    first = read_model_file(path, planned=True)
    parts = [first, *(_read_part(part) for part in split_files(path)[1:])]
    tensors = [_tensor(part, info, number) for number, part in enumerate(parts) for info in part.tensors]
    if not tensors:
        raise PlanningError(f"{path} has no tensors.")
    fields = ((name, value, GGUFValueType(first.types[name])) for name, value in first.values.items())
    return Layout(path, _numbers(fields), tuple(tensors))


def _read_part(path: Path) -> GgufFile:
    try:
        return read_gguf(path)
    except GgufError as error:
        raise PlanningError(f"{path} cannot be read: {error}.") from error
    except OSError as error:
        raise PlanningError(f"{path} cannot be read: {error.strerror}.") from error


def _tensor(part: GgufFile, info: TensorInfo, number: int) -> Tensor:
    try:
        kind = GGMLQuantizationType(info.type)
    except ValueError:
        raise PlanningError(f"{part.path}: {info.name} is of the type {info.type}, which does not exist.") from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape, offset = info.shape[::-1], part.data_start + info.offset
    nbytes = math.prod(shape) // block * size
    if offset + nbytes > part.size:
        raise PlanningError(f"{part.path} is cut short: {info.name} ends beyond it. Download or convert it again.")
    return Tensor(info.name, shape, kind, nbytes, offset, number)


def _numbers(fields: Iterable[HyperParameter]) -> tuple[HyperParameter, ...]:
    return tuple(
        (name, value, kind)
        for name, value, kind in fields
        if name.startswith(f"{_ARCHITECTURE}.") and kind not in (GGUFValueType.ARRAY, GGUFValueType.STRING)
    )


def write_base(path: Path, model: Phi3) -> Layout:
    """Write the skeleton of a checkpoint converted to F16."""
    shapes = [(spec.name, spec.shape) for spec in model.tensors().values()]
    if model.rope.longrope is not None:
        factors = model.rope.longrope.short_factor.shape
        shapes += [("rope_factors_long.weight", factors), ("rope_factors_short.weight", factors)]
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    model.write_metadata(writer)
    f16 = GGMLQuantizationType.F16
    return _write(writer, path, [(name, shape, tensor_type(name, shape, f16)) for name, shape in shapes])


def write_skeleton(path: Path, base: Layout, plan: SizePrediction) -> Layout:
    """Write the skeleton of what a quantisation of `base` would give."""
    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    for key, value, kind in base.hyper_parameters:
        writer.add_key_value(key, value, kind)
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    types = {tensor.name: GGMLQuantizationType[tensor.made.name.upper()] for tensor in plan.tensors}
    return _write(writer, path, [(name, shapes[name], kind) for name, kind in types.items()])


def write_blank_imatrix(path: Path, base: Layout) -> Path:
    """Write an importance matrix in which nothing matters more than the rest: enough for a plan; return its path."""
    entries = {
        tensor.name: ImatrixEntry(np.ones((1, tensor.shape[-1]), np.float32), np.ones(1, np.float32))
        for tensor in base.tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1
    }
    write_imatrix(path, Imatrix(entries, ["none"], 1, 1), force=True)
    return path


def _write(
    writer: gguf.GGUFWriter, path: Path, tensors: Iterable[tuple[str, tuple[int, ...], GGMLQuantizationType]]
) -> Layout:
    """Write header and tensor infos, and make the file as long as with its weights."""
    end, placed = 0, []
    for name, shape, kind in tensors:
        size = encoded_size(math.prod(shape), kind)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        placed.append(Tensor(name, shape, kind, size, end))
        end += writer.ggml_pad(size, writer.data_alignment)
        if name == EMBEDDING and f"{_ARCHITECTURE}.vocab_size" not in writer.kv_data[0]:
            writer.add_vocab_size(shape[0])
    # The texts of the tokens take no part in the plan.
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
    with path.open("r+b") as file:
        file.truncate(start + end)
    # What `read_layout` reads, which takes it longer than all the rest of a plan.
    fields = ((key, field.value, field.type) for key, field in writer.kv_data[0].items())
    return Layout(path, _numbers(fields), tuple(replace(tensor, offset=start + tensor.offset) for tensor in placed))
