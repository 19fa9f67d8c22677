"""A plug-in of pytest that writes down what llama.cpp and the engine say of where a model lies.

The file that ``TEST_DEVICE_REPORT`` names gets ``{"starts": [LINE], "buffers": {KIND: [NAME]}}``: the line of each
engine that was loaded, and the buffers of each kind ("model", "KV", "compute") that llama.cpp allocated.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.planning.buffers import KINDS, Buffers

_watch = Buffers()


def pytest_configure() -> None:
    """Begin."""
    _watch.listen()


def pytest_unconfigure() -> None:
    """Write."""
    buffers = {kind: sorted(name for name, its_kind in _watch.sizes if its_kind == kind) for kind in KINDS}
    Path(os.environ["TEST_DEVICE_REPORT"]).write_text(json.dumps({"starts": _watch.starts, "buffers": buffers}))
