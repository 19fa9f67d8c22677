"""Checkpoint or adapter -> GGUF -> quantised GGUF, offline; `journey` is the one way through it."""

import importlib.metadata


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages on which the bytes of converted and quantised files depend."""
    return {name: importlib.metadata.version(name) for name in ("edge-phi3", "llama-cpp-python", "gguf")}
