"""edge-phi3: Phi-3-mini on small GPUs at the edge, with the meaning of ``transformers.generate``, on llama.cpp.

The names in ``__all__`` are the public Python API, described in ``docs/python.md``. Each is imported when it is first
used, so that ``import edge_phi3`` itself loads neither llama.cpp nor NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edge_phi3.version import __version__

if TYPE_CHECKING:
    from edge_phi3.catalog import Catalog, StoredModel
    from edge_phi3.engine.engine import Engine
    from edge_phi3.engine.engine_settings import EngineSettings
    from edge_phi3.engine.sequence import FinishedEvent, GenerationRequest, TokensEvent
    from edge_phi3.errors import EdgePhi3Error
    from edge_phi3.generation import GenerationConfig
    from edge_phi3.pipeline import GenerationOutput, PreparedPrompt, TextDelta, TextGenerationPipeline

__all__ = [
    "Catalog",
    "EdgePhi3Error",
    "Engine",
    "EngineSettings",
    "FinishedEvent",
    "GenerationConfig",
    "GenerationOutput",
    "GenerationRequest",
    "PreparedPrompt",
    "StoredModel",
    "TextDelta",
    "TextGenerationPipeline",
    "TokensEvent",
    "__version__",
]

_HOMES = {
    "edge_phi3.catalog": ("Catalog", "StoredModel"),
    "edge_phi3.engine.engine": ("Engine",),
    "edge_phi3.engine.sequence": ("FinishedEvent", "GenerationRequest", "TokensEvent"),
    "edge_phi3.engine.engine_settings": ("EngineSettings",),
    "edge_phi3.errors": ("EdgePhi3Error",),
    "edge_phi3.generation": ("GenerationConfig",),
    "edge_phi3.pipeline": ("GenerationOutput", "PreparedPrompt", "TextDelta", "TextGenerationPipeline"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker would take any name for one that this function knows

    def __getattr__(name: str) -> Any:
        """Return a public name, importing its module the first time."""
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
        return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
