"""What can go wrong on the way from a checkpoint to a GGUF.

Each function that reads a part of a checkpoint raises `CheckpointError` where it is damaged or contradicts another, and
`UnsupportedModelError` where it is of a kind that cannot be converted.
"""

from edge_phi3.errors import EdgePhi3Error


class ConversionError(EdgePhi3Error):
    """A checkpoint could not be converted; nothing was written."""


class CheckpointError(ConversionError):
    """A file of the checkpoint is missing, damaged, or disagrees with another one."""


class UnsupportedModelError(ConversionError):
    """The checkpoint is sound, but not a model that can be converted."""
