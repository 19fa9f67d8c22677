"""The only package that calls ``llama_cpp``: models, contexts, and child processes for llama.cpp's longer work.

Arrays that cross the border are NumPy views of llama.cpp's own memory, or memory of ours that llama.cpp reads; nothing
is copied token by token. Importing this package does not load the library. Its errors are defined here.
"""

from edge_phi3.errors import EdgePhi3Error


class ModelLoadError(EdgePhi3Error):
    """The model file cannot be loaded, or is not one that we serve."""


class DecodeFailedError(EdgePhi3Error):
    """llama.cpp failed on a batch."""


class ImatrixError(EdgePhi3Error):
    """An importance matrix cannot be collected."""


class QuantizerError(EdgePhi3Error):
    """llama.cpp's quantiser failed; the message ends with its own last words."""


class PlanningError(EdgePhi3Error):
    """The memory of a model cannot be planned with these options."""
