"""What reports have in common: the machine that was measured on, and how they are written, as JSON and as CSV."""

import csv
import datetime as dt
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil

from edge_phi3.files import atomic_output
from edge_phi3.version import __version__


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """When a measurement was made (in UTC, as ISO 8601), and on what: cores for this process, bytes of memory.

    `load` is the mean number of busy processes in the last minute, before the measurement began.
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
    def here(cls) -> Self:
        """Describe this machine, now."""
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return cls(
            date=dt.datetime.now(tz=dt.UTC).isoformat(timespec="seconds"),
            cpu=next(names, platform.machine()),
            cores=len(os.sched_getaffinity(0)),
            memory=psutil.virtual_memory().total,
            load=round(os.getloadavg()[0], 2),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            edge_phi3=__version__,
            llama_cpp=version("llama-cpp-python"),
        )


def write_json(path: Path, report: msgspec.Struct) -> None:
    """Write a report, replacing the file."""
    with atomic_output(path, force=True) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns, the names of the columns first, replacing the file."""
    with atomic_output(path, force=True) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def columns(figures: msgspec.Struct, **nested: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the columns of some figures; those of a `nested` struct, or None, become columns like ``latency_p95``."""
    row: dict[str, Any] = {}
    for name in figures.__struct_fields__:
        value = getattr(figures, name)
        parts = nested[name].__struct_fields__ if name in nested else ()
        row |= {f"{name}_{part}": getattr(value, part, None) for part in parts} if parts else {name: value}
    return row
