"""The engine's errors, one class for each cause."""

from edge_phi3.errors import EdgePhi3Error


class EngineError(EdgePhi3Error):
    """The root of the engine's errors."""


class RequestTooLargeError(EngineError):
    """The request can never fit the KV cache or the sequence limit of this engine, however idle it is."""


class ContextLengthError(RequestTooLargeError):
    """The prompt fills the context, so that there is no room for an answer."""


class SchemaError(EngineError):
    """A JSON schema cannot be followed: it is none, holds what is not supported, or is beyond a limit."""


class QueueFullError(EngineError):
    """The waiting queue is full; the request may be sent again later."""


class DeadlineExceededError(EngineError):
    """The request's time limit passed before it was finished."""


class EngineStoppedError(EngineError):
    """The engine is stopping, or broken, and takes no requests."""
