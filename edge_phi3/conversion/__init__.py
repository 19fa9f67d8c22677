"""Checkpoint or adapter -> GGUF -> quantised GGUF, offline; `journey` is the one way through it."""

import importlib.metadata

from edge_phi3.errors import EdgePhi3Error


class ConversionError(EdgePhi3Error):
    """A checkpoint could not be converted; nothing was written."""


class CheckpointError(ConversionError):
    """A file of the checkpoint is missing, damaged, or disagrees with another one."""


class UnsupportedModelError(ConversionError):
    """The checkpoint is sound, but of a kind that cannot be converted."""


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages on which the bytes of converted and quantised files depend."""
    return {name: importlib.metadata.version(name) for name in ("edge-phi3", "llama-cpp-python", "gguf")}
