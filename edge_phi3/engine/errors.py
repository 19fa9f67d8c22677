"""What can go wrong in the engine, one class a cause."""

from __future__ import annotations

from edge_phi3.errors import EdgePhi3Error


class EngineError(EdgePhi3Error):
    """The root of the engine's errors."""


class ModelLoadError(EngineError):
    """The model file cannot be loaded, or is not one that this engine serves."""


class GrammarError(EngineError):
    """llama.cpp cannot use a grammar."""


class RequestTooLargeError(EngineError):
    """The request can never fit the KV cache or the sequence limit of this engine, however idle it is."""


class QueueFullError(EngineError):
    """The waiting queue is full; the request may be sent again later."""


class DeadlineExceededError(EngineError):
    """The request's time limit passed before it was finished."""


class DecodeFailedError(EngineError):
    """llama.cpp failed on a batch that held the request."""


class InternalError(EngineError):
    """An error of the service's own ended the request; its log tells more."""


class EngineStoppedError(EngineError):
    """The engine is stopping, or broken, and takes no requests."""
