"""A plug-in of pytest that writes down what llama.cpp and the engine say of where a model lies.

The file that ``TEST_DEVICE_REPORT`` names gets ``{"starts": [LINE], "buffers": {KIND: [NAME]}}``: the line of each
engine that was loaded, and the buffers of each kind ("model", "KV", "compute") that llama.cpp allocated.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

_BUFFER = re.compile(r": +(\S+) +(model|KV|compute) buffer size = ")


class Watch(logging.Handler):
    """Reads the log of the engine."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.starts: list[str] = []
        self.buffers: dict[str, set[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        line = record.getMessage()
        if match := _BUFFER.search(line):
            self.buffers.setdefault(match[2], set()).add(match[1])
        elif record.name == "edge_phi3.engine.loader":
            self.starts.append(line)


_watch = Watch()


def pytest_configure() -> None:
    """Begin."""
    for name in ("llama", "engine.loader"):
        logger = logging.getLogger(f"edge_phi3.{name}")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(_watch)


def pytest_unconfigure() -> None:
    """Write."""
    buffers = {kind: sorted(names) for kind, names in _watch.buffers.items()}
    Path(os.environ["TEST_DEVICE_REPORT"]).write_text(json.dumps({"starts": _watch.starts, "buffers": buffers}))
