"""Errors -> responses: each kind has one status code, and every body is ``{"detail": "a sentence"}``.

Those of the routes under ``/v1`` have OpenAI's shape instead: ``{"error": {"message", "type", "param", "code"}}``.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

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

LONGEST_SENTENCE = 1000
"""Characters of an error."""


class InvalidRequestError(EdgePhi3Error):
    """The body or a field of a request is wrong."""


class ClientDisconnectedError(EdgePhi3Error):
    """The client closed the connection before its answer was ready."""


class RefusedError(EdgePhi3Error):
    """A request is refused for another reason: with a status code, and with headers beside the usual ones."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(detail)
        self.status, self.headers = status, headers


_STATUS_CODES: Final[Mapping[int, tuple[type[EdgePhi3Error], ...]]] = {
    400: (InvalidRequestError, GenerationError, ParameterError, PromptError, RequestTooLargeError),
    429: (QueueFullError,),
    499: (ClientDisconnectedError,),  # for logs and metrics: nobody receives it
    503: (EngineStoppedError,),
    504: (DeadlineExceededError,),
}
"""The status code of each kind of error; any other is 500."""

_OPENAI_ERRORS: Final[Mapping[int, tuple[str, str]]] = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", "model_not_found"),
    405: ("invalid_request_error", "method_not_supported"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("server_error", "service_unavailable"),
}
"""The type and code of errors there that have a code."""
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
    429: {"Retry-After": "1"},  # about the time in which a place in the queue becomes free
}


def status_code_of(error: BaseException) -> int:
    """Return the status code of an error."""
    if isinstance(error, RefusedError):
        return error.status
    return next((status for status, kinds in _STATUS_CODES.items() if isinstance(error, kinds)), 500)


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
    kind, usual = _OPENAI_ERRORS.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
    code = code or usual
    if status == 404 and {"route_handler"} - scope.keys():  # no route, so no model either
        kind, code = "invalid_request_error", "unknown_url"
    return OpenAIError(OpenAIErrorBody(message, kind, field[1] if field else None, code))


def _answer(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    if not isinstance(error, EdgePhi3Error):
        log_unforeseen(request.scope, error)
    status = status_code_of(error)
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    headers = _HEADERS.get(status, {}) | dict(getattr(error, "headers", {}))
    body = error_body(request.scope, detail_of(error), status, code)
    return Response(body, status_code=status, headers=headers, media_type=MediaType.JSON)


def _answer_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """Answer what Litestar itself refuses: no such route or method, a body too large."""
    detail, path = error.detail, request.scope["path"][:200]
    if isinstance(error, NotFoundException) and detail == "Not Found":
        absent = next((what for beginning, what in _ABSENT.items() if path.startswith(beginning)), None)
        detail = f"There is nothing at {path}{f', since {absent}' if absent else ''}; /docs shows what there is."
    elif isinstance(error, MethodNotAllowedException):
        detail = f"{request.scope['state']['exchange'].scope['method']} is not a method of {path}."
        allowed = ", ".join(value for name, value in (error.headers or {}).items() if name.lower() == "allow")
        error.headers = {"Allow": f"{allowed}, HEAD" if "GET" in allowed else allowed}  # which Exchanges turns into GET
    elif error.status_code == 413:
        detail = "The body is larger than this service takes (--max-body-size)."
    return _answer(request, RefusedError(error.status_code, detail, error.headers or {}))


EXCEPTION_HANDLERS: ExceptionHandlersMap = {HTTPException: _answer_http, Exception: _answer}
