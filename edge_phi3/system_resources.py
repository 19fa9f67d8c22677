"""What this process may use of the machine: its GPUs, through NVML, its cores and its main memory."""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pynvml

Value = TypeVar("Value")

_CGROUP, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file "),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
)
"""The files of limit and usage in version 2 and in version 1, and the cached files' line in ``memory.stat``."""


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
        indices = range(_if_supported(pynvml.nvmlDeviceGetCount) or 0)
        handles = [_if_supported(functools.partial(pynvml.nvmlDeviceGetHandleByIndex, index)) for index in indices]
        return [_gpu(index, handle) for index, handle in enumerate(handles) if handle is not None]
    finally:
        pynvml.nvmlShutdown()


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


def usable_cores() -> int:
    """Return the physical cores that this process may use: hyper-threads, CPU affinity and cgroup quotas considered."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    for group in _cgroups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            both = group / "cpu.max"
            quota, period = both.read_text("ascii").split() if both.exists() else (
                (group / f"cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period")
            )  # fmt: skip
            if int(quota) > 0:
                cores = max(1, min(cores, int(quota) // int(period)))
    return cores


def available_memory() -> int:
    """Return the bytes of main memory that this process may still take: the machine's, within its cgroups' limits."""
    available = int(psutil.virtual_memory().available)
    for group in _cgroups("memory"):
        for limit, used, cached in _MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError):
                room = int((group / limit).read_text("ascii")) - int((group / used).read_text("ascii"))
                lines = (group / "memory.stat").read_text("ascii").splitlines()
                # Cached files count as used until somebody needs their memory.
                room += next((int(line.split()[1]) for line in lines if line.startswith(cached)), 0)
                available = max(0, min(available, room))
    return available


def give_back_memory() -> None:
    """Return to the system what glibc keeps of memory that was freed, where it is the C library."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _padding: 0)(0)


def _cgroups(controller: str) -> list[Path]:
    """Return the folders of this process's cgroup and of those around it, where a controller may set limits.

    A container often sees its own cgroup as the root, under a path that only its host has.
    """
    try:
        lines = _MEMBERSHIP.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        lines = ["0::/"]
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if not controllers or controller in controllers.split(","):  # version 2 has one tree for all
            own = Path(path.lstrip("/"))
            found += [_CGROUP / controllers / folder for folder in (own, *own.parents)]
    return found
