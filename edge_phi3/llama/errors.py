"""What can go wrong in llama.cpp, one class a cause."""

from __future__ import annotations

from edge_phi3.errors import EdgePhi3Error


class ModelLoadError(EdgePhi3Error):
    """The model file cannot be loaded, or is not one that we serve."""


class GrammarError(EdgePhi3Error):
    """llama.cpp cannot use a grammar."""


class DecodeFailedError(EdgePhi3Error):
    """llama.cpp failed on a batch."""
