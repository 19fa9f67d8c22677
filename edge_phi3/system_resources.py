"""What this process may use of the machine: its GPUs, through NVML, and its main memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pynvml

Value = TypeVar("Value")

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a slice of one: its place on the PCI bus, its name, and the bytes of its memory.

    `load` is the per cent of the last moments in which it worked, `temperature` is in degrees Celsius; each is None
    when it cannot tell, as slices (MIG, vGPU) cannot of their load.
    """

    index: int
    name: str
    total: int
    used: int
    free: int
    load: int | None
    temperature: int | None


def gpus() -> list[Gpu]:
    """Return NVIDIA's GPUs; none without a GPU or its driver.

    Those that share the machine's memory, as Jetson's and GB10's, have none of their own to tell of.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = map(_handle, range(_if_supported(pynvml.nvmlDeviceGetCount) or 0))
        return [_gpu(index, handle) for index, handle in enumerate(handles) if handle is not None]
    finally:
        pynvml.nvmlShutdown()


def _handle(index: int) -> Any:
    return _if_supported(lambda: pynvml.nvmlDeviceGetHandleByIndex(index))


def _gpu(index: int, handle: Any) -> Gpu:
    memory = _if_supported(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    shared = psutil.virtual_memory()
    name = _if_supported(lambda: pynvml.nvmlDeviceGetName(handle)) or "NVIDIA GPU"
    return Gpu(
        index=index,
        name=name.decode() if isinstance(name, bytes) else name,
        total=int(memory.total if memory else shared.total),
        used=int(memory.used if memory else shared.total - shared.available),
        free=int(memory.free if memory else shared.available),
        load=_if_supported(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        temperature=_if_supported(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    )


def _if_supported(read: Callable[[], Value]) -> Value | None:
    try:
        return read()
    except pynvml.NVMLError:
        return None


def available_memory() -> int:
    """Return the bytes of main memory that this process may still take: the machine's, within its cgroup's limit."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        statistics = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return available
    # Cached files count as used until somebody needs their memory.
    cached = next((int(line.split()[1]) for line in statistics if line.startswith("inactive_file ")), 0)
    return max(0, min(available, limit - used + cached))
