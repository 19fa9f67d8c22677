"""The machine of a measurement: what it is, and how much memory this process and its GPUs take."""

from __future__ import annotations

import datetime as dt
import os
import platform
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil

from edge_phi3.system_resources import gpus
from edge_phi3.version import __version__


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances of a measurement: when it was made (in UTC, as ISO 8601), and on what.

    `cores` are those that this process may use, `memory` is in bytes, and `load` is the mean number of busy processes
    in the last minute, before the measurement began.
    """

    date: str
    cpu: str
    cores: int
    memory: int
    load: float | None
    system: str
    python: str
    edge_phi3: str
    llama_cpp: str

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine, now."""
        return cls(
            date=dt.datetime.now(tz=dt.UTC).isoformat(timespec="seconds"),
            cpu=_cpu_name(),
            cores=len(os.sched_getaffinity(0)),
            memory=psutil.virtual_memory().total,
            load=round(os.getloadavg()[0], 2),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            edge_phi3=__version__,
            llama_cpp=version("llama-cpp-python"),
        )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def peak_resident_bytes() -> int:
    """Return the most resident memory that this process has had, mapped files included."""
    # getrusage's ru_maxrss begins with what the parent had when it forked; VmHWM begins anew with the program.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def gpu_bytes_in_use() -> int | None:
    """Return the bytes in use on all GPUs together, by any process; None without an NVIDIA GPU.

    A process cannot be told from others inside a container, so a measurement takes the difference of two calls.
    """
    found = gpus()
    return sum(gpu.used for gpu in found) if found else None
