"""GGUF files as llama.cpp's loader sees them, and what they take of a GPU's memory and of the machine's.

A skeleton is a GGUF whose weights are a hole in a sparse file: it takes a few kilobytes of the disk, and llama.cpp
plans the memory of the model from it as from the real one.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from edge_phi3.conversion.imatrix_file import Imatrix, ImatrixEntry, write_imatrix
from edge_phi3.conversion.phi3 import Phi3
from edge_phi3.conversion.plan import encoded_size, tensor_type
from edge_phi3.conversion.quantize import SizePrediction
from edge_phi3.gguf_file import GgufError, GgufFile, TensorInfo, read_gguf, split_files
from edge_phi3.llama import PlanningError
from edge_phi3.llama.memory import ContextMemory
from edge_phi3.llama.model_file import read_model_file

_ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3]
_UNQUANTISED = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}

EMBEDDING = "token_embd.weight"

_BLOCK = re.compile(r"blk\.(\d+)\.")
_DEVICE_ALIGNMENT = 128
"""Bytes at which CUDA's backend aligns tensors."""

HyperParameter = tuple[str, Any, GGUFValueType]
"""A key of a GGUF, its value, and the type that it is stored in."""


class Tensor(NamedTuple):
    """A tensor of a GGUF. `shape` has the rows first; `offset` and `size` are bytes in the file number `file`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    size: int
    offset: int
    file: int = 0


class Layout(NamedTuple):
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
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return 8 * sum(tensor.size for tensor in self.tensors) / weights


def read_layout(path: Path) -> Layout:
    """Read the header of a model's GGUF, of each file when it is split."""
    first = read_model_file(path, planned=True)
    parts = [first]
    for part in split_files(path)[1:]:
        try:
            parts.append(read_gguf(part))
        except (GgufError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise PlanningError(f"{part} cannot be read: {why}.") from error
    tensors = [_tensor(part, info, number) for number, part in enumerate(parts) for info in part.tensors]
    if not tensors:
        raise PlanningError(f"{path} has no tensors.")
    fields = ((name, value, GGUFValueType(first.types[name])) for name, value in first.values.items())
    return Layout(path, _numbers(fields), tuple(tensors))


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
    return Layout(path, _numbers(fields), tuple(tensor._replace(offset=start + tensor.offset) for tensor in placed))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes in one place, the GPU's memory or the machine's, where weights are a mapped file and what is repacked."""

    weights: int = 0
    kv_cache: int = 0
    compute: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv_cache + self.compute + self.output


class Placement(NamedTuple):
    """Where a model's memory lies: with so many layers on the device, the output counted as one; None without one."""

    layers: int | None
    device: Memory
    host: Memory


def first_on_device(layout: Layout, offloaded: int) -> int:
    """Return the first block on the GPU; llama.cpp offloads the output first, then blocks from the end."""
    return max(layout.layers + 1 - offloaded, 0)


def host_pattern(layout: Layout, offloaded: int) -> str:
    """Return a regular expression for the tensors that stay where the CPU computes."""
    if offloaded <= 0:
        return ".*"
    blocks = "|".join(str(number) for number in range(min(first_on_device(layout, offloaded), layout.layers)))
    return r"^token_embd\." + (rf"|^blk\.({blocks})\." if blocks else "")


def place(
    layout: Layout,
    contexts: Sequence[ContextMemory],
    buffers: set[tuple[str, str]],
    *,
    offloaded: int | None,
    gpu_asked: bool,
) -> Placement:
    """Add up what a model and its contexts take with so many layers on the GPU.

    `buffers` are llama.cpp's for the tensors that stay in main memory. When `contexts` are not the answers of a
    llama.cpp that has the GPU (`gpu_asked`), all compute buffers are taken to be there once a layer is.
    """
    count = offloaded or 0
    kv_cache = sum(context.kv for context in contexts)
    device_kv = kv_cache * min(max(count - 1, 0), layout.layers) // layout.layers
    compute = [item for context in contexts for item in context.compute.items()]
    on_host = [name.startswith("CPU") or name.endswith("_Host") if gpu_asked else not count for name, _ in compute]
    device_compute = sum(size for (_, size), host in zip(compute, on_host, strict=True) if not host)
    host_compute = sum(size for _, size in compute) - device_compute
    output = sum(context.output for context in contexts)
    return Placement(
        layers=offloaded,
        device=Memory(_device_weights(layout, count), device_kv, device_compute),
        host=Memory(_host_weights(layout, buffers, count), kv_cache - device_kv, host_compute, output),
    )


def _on_device(layout: Layout, name: str, offloaded: int) -> bool:
    if match := _BLOCK.match(name):
        return int(match[1]) >= first_on_device(layout, offloaded)
    if name.startswith("rope_factors_"):
        return offloaded > layout.layers
    return name != EMBEDDING and offloaded > 0


def _device_weights(layout: Layout, offloaded: int) -> int:
    sizes = [tensor.size for tensor in layout.tensors if _on_device(layout, tensor.name, offloaded)]
    # An embedding that is the output matrix too is there twice.
    if offloaded and all(tensor.name != "output.weight" for tensor in layout.tensors):
        sizes += [tensor.size for tensor in layout.tensors if tensor.name == EMBEDDING]
    return sum(-(-size // _DEVICE_ALIGNMENT) * _DEVICE_ALIGNMENT for size in sizes)


def _host_weights(layout: Layout, buffers: set[tuple[str, str]], offloaded: int) -> int:
    """Return the bytes of the mapped part of the file, from its first tensor to its last, and of repacked ones."""
    kept = [tensor for tensor in layout.tensors if not _on_device(layout, tensor.name, offloaded)]
    repacked = {name for name, buffer in buffers if not _is_plain(buffer)}
    plain = {name for name, buffer in buffers if _is_plain(buffer)}
    spans: dict[int, tuple[int, int]] = {}
    for tensor in kept:
        if tensor.name not in repacked or tensor.name in plain:
            first, last = spans.get(tensor.file, (tensor.offset, 0))
            spans[tensor.file] = min(first, tensor.offset), max(last, tensor.offset + tensor.size)
    mapped = sum(last - first for first, last in spans.values())
    return mapped + sum(tensor.size for tensor in kept if tensor.name in repacked)


def _is_plain(buffer: str) -> bool:  # where a mapped file serves as well
    return buffer == "CPU" or buffer.endswith("_Host")
