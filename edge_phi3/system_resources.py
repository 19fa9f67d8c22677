"""What this process may use of the machine: its GPUs, through NVML, and its main memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml

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
    """Return NVIDIA's GPUs; none without a GPU or its driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = pynvml.nvmlDeviceGetName(handle)
    return Gpu(
        index=index,
        name=name.decode() if isinstance(name, bytes) else name,
        total=int(memory.total),
        used=int(memory.used),
        free=int(memory.free),
        load=_if_supported(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        temperature=_if_supported(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    )


def _if_supported(read: Callable[[], int]) -> int | None:
    try:
        return int(read())
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
