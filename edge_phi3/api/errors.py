"""Errors -> responses: each kind has one status code, and every body is ``{"detail": "a sentence"}``.

Those of the routes under ``/v1`` have OpenAI's shape instead: ``{"error": {"message", "type", "param", "code"}}``.
"""

import re
from typing import Any

import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.types import ExceptionHandlersMap, Scope

from edge_phi3.api.openai.schemas import OpenAIError, OpenAIErrorBody
from edge_phi3.api.schemas import ErrorResponse
from edge_phi3.engine.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineStoppedError,
    QueueFullError,
    RequestTooLargeError,
)
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.generation.decoding import GenerationError
from edge_phi3.generation.values import ParameterError
from edge_phi3.pipeline import PromptError

logger = structlog.get_logger(__name__)

RETRY_AFTER_SECONDS = 1
"""Seconds that a client should wait when the queue is full: about the time in which a slot becomes free."""

LONGEST_SENTENCE = 1000
"""Characters of an error."""

CLIENT_GONE = 499
"""The status that logs and metrics show when the client left before the answer; nobody receives it."""


class InvalidRequestError(EdgePhi3Error):
    """The body or a field of a request is wrong."""


class UnsupportedMediaTypeError(EdgePhi3Error):
    """The body is not said to be JSON."""


class RateLimitedError(EdgePhi3Error):
    """The client asks too often; `headers` are those of the answer."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"Too many requests (--rate-limit); try again in {seconds} s.")
        self.headers = {"Retry-After": str(seconds)}


class WrongHostError(EdgePhi3Error):
    """The request calls the service by a name that is not its own."""


class UnauthorizedError(EdgePhi3Error):
    """The request carries no key that the service knows."""


class NotReadyError(EdgePhi3Error):
    """The model is not loaded yet, or the service is stopping."""


class ModelNotFoundError(EdgePhi3Error):
    """The request names a model that is not served."""


class UnhealthyError(EdgePhi3Error):
    """The model is not loaded, or the engine is broken: the original's answer to ``/healthz``."""


class ClientDisconnectedError(EdgePhi3Error):
    """The client closed the connection before its answer was ready."""


STATUS_CODES: dict[type[EdgePhi3Error], int] = {
    InvalidRequestError: 400,
    GenerationError: 400,
    ParameterError: 400,
    PromptError: 400,
    RequestTooLargeError: 400,
    UnauthorizedError: 401,
    ModelNotFoundError: 404,
    UnsupportedMediaTypeError: 415,
    WrongHostError: 421,
    QueueFullError: 429,
    RateLimitedError: 429,
    ClientDisconnectedError: CLIENT_GONE,
    UnhealthyError: 500,
    EngineStoppedError: 503,
    NotReadyError: 503,
    DeadlineExceededError: 504,
}
"""The status code of each kind of error; any other is 500."""

_OPENAI_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_OPENAI_CODES = {
    401: "invalid_api_key",
    404: "model_not_found",
    405: "method_not_supported",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
}
_ABSENT = {
    "/v1/embeddings": "this service makes no embeddings",
    "/v1/images": "this model reads and writes text only",
    "/v1/audio": "this model reads and writes text only",
    "/v1/responses/": "no response is kept",
    "/v1/conversations": "no conversation is kept",
}
"""What OpenAI has that this service has not, and why."""
_FIELD = re.compile(r"`([a-z_]+)[^`]*`")

_HEADERS: dict[int, dict[str, str]] = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": str(RETRY_AFTER_SECONDS)},
}


def status_code_of(error: BaseException) -> int:
    """Return the status code of an error."""
    for class_ in type(error).__mro__:
        if class_ in STATUS_CODES:
            return STATUS_CODES[class_]
    return 500


def detail_of(error: BaseException) -> str:
    """Return the sentence that a client reads. An error that nobody foresaw keeps its text to the logs."""
    if isinstance(error, EdgePhi3Error):
        return str(error)
    return "The service met an error of its own; its log has more under this request's X-Request-Id."


def log_unforeseen(scope: Scope, error: BaseException) -> None:
    """Log an error that nobody foresaw under the id that the client is told."""
    request_id = scope["state"]["exchange"].request_id
    logger.error("unhandled error", path=scope["path"][:200], request_id=request_id, exc_info=error)


def is_openai(scope: Scope) -> bool:
    """Return whether a request is answered in OpenAI's shapes."""
    return f"{scope['path']}/".startswith("/v1/")


def error_body(scope: Scope, message: str, status: int, code: str | None = None) -> ErrorResponse | OpenAIError:
    """Return the body of an error; in OpenAI's shape its `param` is the first field that the sentence names.

    Whatever of a request is in the sentence, it is no longer than `LONGEST_SENTENCE`.
    """
    message = message if len(message) <= LONGEST_SENTENCE else message[: LONGEST_SENTENCE - 3] + "..."
    if not is_openai(scope):
        return ErrorResponse(message)
    field = _FIELD.search(message) if status == 400 else None
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or _OPENAI_CODES.get(status)
    if status == 404 and {"route_handler"} - scope.keys():  # no route, so no model either
        kind, code = "invalid_request_error", "unknown_url"
    return OpenAIError(OpenAIErrorBody(message, kind, field[1] if field else None, code))


def _respond(
    request: Request[Any, Any, Any], detail: str, status: int, headers: dict[str, str], code: str | None = None
) -> Response[Any]:
    body = error_body(request.scope, detail, status, code)
    return Response(body, status_code=status, headers=headers, media_type=MediaType.JSON)


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    if not isinstance(error, EdgePhi3Error):
        log_unforeseen(request.scope, error)
    status = status_code_of(error)
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    return _respond(request, detail_of(error), status, getattr(error, "headers", _HEADERS.get(status, {})), code)


def _answer_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """Answer what Litestar itself refuses: no such route or method, a body too large."""
    headers, detail, path = dict(error.headers or {}), error.detail, request.scope["path"][:200]
    if isinstance(error, NotFoundException) and detail == "Not Found":
        absent = next((what for beginning, what in _ABSENT.items() if path.startswith(beginning)), None)
        detail = f"There is nothing at {path}{f', since {absent}' if absent else ''}; /docs shows what there is."
    elif isinstance(error, MethodNotAllowedException):
        detail = f"{request.scope['state']['exchange'].scope['method']} is not a method of {path}."
    elif error.status_code == 413:
        detail = "The body is larger than this service takes (--max-body-size)."
    return _respond(request, detail, error.status_code, headers)


EXCEPTION_HANDLERS: ExceptionHandlersMap = {HTTPException: _answer_http, Exception: _answer}
