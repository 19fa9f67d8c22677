"""Planned memory beside what llama.cpp allocates when an engine loads the model, as its own log says.

As a plug-in of pytest it writes what all tests loaded to the file that TEST_DEVICE_REPORT names. As a program it plans
and loads models: cases come in on stdin, what was planned and allocated goes out. A case is
``{"model": PATH, "types": [TYPE], "options": {...}, "free": BYTES}``, without types for a quantised file.
"""

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from edge_phi3.engine import loader
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.planning.fit import Machine, Options, Row, fit
from edge_phi3.planning.gguf_layout import read_layout

MIB = 1 << 20
TOLERANCE = 0.05
ROUNDING = 0.011 * MIB
"""llama.cpp logs hundredths of a MiB, of which the smallest buffers here have a few."""

KINDS = ("model", "KV", "compute", "output")
Places = Mapping[str, Mapping[str, int]]
"""Bytes by place ("device" or "host") and kind of buffer, in llama.cpp's words."""

_BUFFER = re.compile(r": +(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")


class Buffers(logging.Handler):
    """Adds up the buffers of llama.cpp's log by name and kind, and keeps what each engine says when it has loaded."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.sizes: Counter[tuple[str, str]] = Counter()
        self.starts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if match := _BUFFER.search(record.getMessage()):
            self.sizes[match[1], match[2]] += round(float(match[3]) * MIB)
        elif record.name == "edge_phi3.engine.loader":
            self.starts.append(record.getMessage())

    def listen(self) -> None:
        logger = logging.getLogger("edge_phi3")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self)

    def places(self) -> Places:
        found: dict[str, Counter[str]] = {"device": Counter(), "host": Counter()}
        for (name, kind), size in self.sizes.items():
            found["host" if name.startswith("CPU") or name.endswith("_Host") else "device"][kind] += size
        return found


def loaded(path: Path, **options: Any) -> Buffers:
    """Load a model; return what llama.cpp says it allocated."""
    buffers, logger = Buffers(), logging.getLogger("edge_phi3")
    level = logger.level
    buffers.listen()
    try:
        with mock.patch.object(loader, "measure", return_value=None):  # the speed of batches
            loader.load(EngineSettings(path, **options)).close()
    finally:
        logger.removeHandler(buffers)
        logger.setLevel(level)
    return buffers


def planned(row: Row) -> Places:
    memories = {"device": row.placement.device, "host": row.placement.host}
    return {
        place: {"model": memory.weights, "KV": memory.kv_cache, "compute": memory.compute, "output": memory.output}
        for place, memory in memories.items()
    }


def check(plan: Places, truth: Places) -> None:
    """Compare each kind of buffer in each place, and the sums."""
    for place in ("device", "host"):
        for kind in KINDS:
            size = truth[place].get(kind, 0)
            assert plan[place][kind] == pytest.approx(size, rel=TOLERANCE, abs=2 * ROUNDING), (place, kind)
        assert sum(plan[place].values()) == pytest.approx(sum(truth[place].values()), rel=TOLERANCE), place


_watch = Buffers()


def pytest_configure() -> None:
    _watch.listen()


def pytest_unconfigure() -> None:
    buffers = {kind: sorted(name for name, its_kind in _watch.sizes if its_kind == kind) for kind in KINDS}
    Path(os.environ["TEST_DEVICE_REPORT"]).write_text(json.dumps({"starts": _watch.starts, "buffers": buffers}))


def _answer(case: dict[str, Any]) -> dict[str, Any]:
    path, options = Path(case["model"]), case["options"]
    machine = Machine(gpu=True, name="a device", free=case["free"], reserve=0)
    found = fit(read_layout(path), Options(**options), machine, case["types"])
    (row,) = found.rows
    buffers = loaded(path, **options | {"n_gpu_layers": row.placement.layers})
    return {
        "layers": row.placement.layers,
        "asked": found.gpu_asked,
        "planned": planned(row),
        "allocated": buffers.places(),
        "said": buffers.starts[-1],
    }


if __name__ == "__main__":
    json.dump([_answer(case) for case in json.load(sys.stdin)], sys.stdout)
