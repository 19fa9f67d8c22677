"""Arithmetic on a model's memory: what lies on the GPU and what beside it, for any number of offloaded layers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edge_phi3.llama.memory import ContextMemory
from edge_phi3.planning.gguf_layout import EMBEDDING, Layout

_BLOCK = re.compile(r"blk\.(\d+)\.")
_DEVICE_ALIGNMENT = 128
"""Bytes at which CUDA's backend aligns tensors."""


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


@dataclass(frozen=True, slots=True)
class Placement:
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
    blocks = min(max(count - 1, 0), layout.layers)
    device_kv = kv_cache * blocks // layout.layers
    compute = [item for context in contexts for item in context.compute.items()]
    device_compute = sum(size for name, size in compute if (not _is_host(name) if gpu_asked else count > 0))
    output = sum(context.output for context in contexts)
    return Placement(
        layers=offloaded,
        device=Memory(_device_weights(layout, count), device_kv, device_compute),
        host=Memory(
            _host_weights(layout, buffers, count),
            kv_cache - device_kv,
            sum(size for _, size in compute) - device_compute,
            output,
        ),
    )


def _on_device(layout: Layout, name: str, offloaded: int) -> bool:
    if match := _BLOCK.match(name):
        return int(match[1]) >= first_on_device(layout, offloaded)
    if name.startswith("rope_factors_"):
        return offloaded > layout.layers
    return name != EMBEDDING and offloaded > 0


def _device_weights(layout: Layout, offloaded: int) -> int:
    sizes = [tensor.size for tensor in layout.tensors if _on_device(layout, tensor.name, offloaded)]
    if layout.tied and offloaded:
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


def _is_plain(buffer: str) -> bool:
    """Whether a buffer is ordinary memory, where a mapped file serves as well."""
    return buffer == "CPU" or buffer.endswith("_Host")


def _is_host(buffer: str) -> bool:
    return buffer.startswith("CPU") or buffer.endswith("_Host")
