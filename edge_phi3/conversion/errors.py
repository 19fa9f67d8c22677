"""What can go wrong on the way from a checkpoint to a GGUF."""

from __future__ import annotations

from edge_phi3.errors import EdgePhi3Error


class ConversionError(EdgePhi3Error):
    """A checkpoint could not be converted; nothing was written."""


class CheckpointError(ConversionError):
    """A file of the checkpoint is missing, damaged, or disagrees with another one."""


class UnsupportedModelError(ConversionError):
    """The checkpoint is sound, but not a model that can be converted."""


class VocabularyError(ConversionError):
    """The tokenizer files are damaged, disagree, or do not fit the model."""
