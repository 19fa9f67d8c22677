"""edge-phi3: Phi-3-mini on small GPUs at the edge, with the meaning of ``transformers.generate``, on llama.cpp."""

__version__ = "0.1.0"
