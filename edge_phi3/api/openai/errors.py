"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from litestar import Request, Response
from litestar.types import ExceptionHandler, ExceptionHandlersMap

from edge_phi3.api import errors
from edge_phi3.api.openai.schemas import OpenAIError, OpenAIErrorBody
from edge_phi3.api.schemas import ErrorResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded", 503: "service_unavailable"}
_FIELD = re.compile(r"`([a-z_]+)[^`]*`")


def openai_error(message: str, status: int) -> OpenAIError:
    """Make the body of an error; its `param` is the first field that the sentence names."""
    field = _FIELD.search(message) if status == 400 else None
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return OpenAIError(OpenAIErrorBody(message, kind, field[1] if field else None, _CODES.get(status)))


def error_body(error: Exception) -> OpenAIError:
    """Make the body for an exception, as a stream that has begun sends it."""
    return openai_error(errors.detail_of(error), errors.status_code_of(error))


def _reshaped(plain: Callable[[Request[Any, Any, Any], Any], Response[ErrorResponse]]) -> ExceptionHandler[Any]:
    """Return the handler that answers as `plain` does, in OpenAI's shape."""

    def answer(request: Request[Any, Any, Any], error: Exception) -> Response[OpenAIError]:
        response = plain(request, error)
        status = response.status_code or 500
        return Response(openai_error(response.content.detail, status), status_code=status, headers=response.headers)

    return answer


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    kind: _reshaped(handler) for kind, handler in errors.EXCEPTION_HANDLERS.items()
}
"""What answers the errors of the routes under ``/v1``."""
