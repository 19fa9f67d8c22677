"""llama.cpp, as the engine sees it: a model, its vocabulary, and contexts that decode batches.

The only files of the service that call ``llama_cpp``. Arrays that cross the border are NumPy views of llama.cpp's own
memory, or memory of ours that llama.cpp reads; nothing is copied token by token.
"""

from edge_phi3.engine.runtime.backend import initialise_backend, supports_gpu_offload
from edge_phi3.engine.runtime.context import Context, context_parameters
from edge_phi3.engine.runtime.model import CANDIDATE, Grammar, Model, read_metadata

__all__ = [
    "CANDIDATE",
    "Context",
    "Grammar",
    "Model",
    "context_parameters",
    "initialise_backend",
    "read_metadata",
    "supports_gpu_offload",
]
