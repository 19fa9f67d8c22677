"""The packages on whose versions the bytes of converted and quantised files depend."""

from __future__ import annotations

import importlib.metadata

_TOOLS = ("edge-phi3", "llama-cpp-python", "gguf")


def tool_versions() -> dict[str, str]:
    """Give the versions of the packages that convert and quantise."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}
