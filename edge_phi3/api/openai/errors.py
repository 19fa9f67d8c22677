"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap

from edge_phi3.api.errors import answer_http, answer_unforeseen, detail_of, headers_of, status_code_of
from edge_phi3.api.openai.schemas import OpenAIError, OpenAIErrorBody
from edge_phi3.errors import EdgePhi3Error

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
    return openai_error(detail_of(error), status_code_of(error))


def _answer(_request: Request[Any, Any, Any], error: Exception) -> Response[OpenAIError]:
    status = status_code_of(error)
    return Response(error_body(error), status_code=status, headers=headers_of(status))


def _reshape(request: Request[Any, Any, Any], error: HTTPException) -> Response[OpenAIError]:
    plain = answer_http(request, error)
    return Response(
        openai_error(plain.content.detail, error.status_code), status_code=error.status_code, headers=plain.headers
    )


def _reshape_unforeseen(request: Request[Any, Any, Any], error: Exception) -> Response[OpenAIError]:
    plain = answer_unforeseen(request, error)
    return Response(openai_error(plain.content.detail, 500), status_code=500)


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    EdgePhi3Error: _answer,
    HTTPException: _reshape,
    Exception: _reshape_unforeseen,
}
"""What answers the errors of the routes under ``/v1``."""
