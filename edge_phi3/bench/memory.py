"""How much memory this process took, and how much is taken on the GPUs."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil

from edge_phi3.system_resources import gpus


def peak_resident_bytes() -> int:
    """Give the most resident memory that this process has had, mapped files included."""
    # The kernel's maxrss begins with what the parent had when it forked; VmHWM begins anew with the program.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return int(info.peak_wset)
    import resource  # noqa: PLC0415 - absent on Windows

    return max(int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss), int(info.rss))


def resident_bytes() -> int:
    """Give the resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def gpu_bytes_in_use() -> int | None:
    """Give the bytes in use on all GPUs together, by any process; None without an NVIDIA GPU.

    A process cannot be told from others inside a container, so a measurement takes the difference of two calls.
    """
    found = gpus()
    return sum(gpu.used for gpu in found) if found else None
