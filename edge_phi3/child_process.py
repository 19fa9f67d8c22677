"""How a module of this package is run in a process of its own, so that a crash, a log and memory stay there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PACKAGE_PARENT = Path(__file__).resolve().parents[1]


def child_command(module: str) -> list[str]:
    """Give the command that runs a module with this interpreter."""
    return [sys.executable, "-P", "-m", module]


def child_environment() -> dict[str, str]:
    """Give an environment in which a child finds this very package, wherever the parent found it."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_PACKAGE_PARENT), *([inherited] if inherited else [])]),
        # Two threads that fail an assertion together wait for each other's backtrace for ever.
        "GGML_NO_BACKTRACE": "1",
    }
