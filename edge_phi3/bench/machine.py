"""Where and with what a figure was measured, so that nobody compares it with one from elsewhere."""

from __future__ import annotations

import datetime as dt
import os
import platform
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil

from edge_phi3.version import __version__


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances of a measurement.

    Attributes:
        date: when, in UTC, as ISO 8601.
        cpu: the processor's name.
        cores: processors that this process may use.
        memory: bytes.
        load: mean number of busy processes in the last minute, before the measurement began; None on Windows.
        system: operating system and its version.
        python: version of the interpreter.
        edge_phi3: version of this package.
        llama_cpp: version of llama-cpp-python.
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
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        return cls(
            date=dt.datetime.now(tz=dt.UTC).isoformat(timespec="seconds"),
            cpu=_cpu_name(),
            cores=len(cores),
            memory=psutil.virtual_memory().total,
            load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            edge_phi3=__version__,
            llama_cpp=version("llama-cpp-python"),
        )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
