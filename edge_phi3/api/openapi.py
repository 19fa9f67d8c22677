"""The OpenAPI document: every route, request, response and status code, made from the types that the code uses."""

import functools
import inspect
import json
import re
from importlib.resources import files
from types import ModuleType
from typing import Any, get_args

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute
from msgspec import Struct

from edge_phi3.api import schemas
from edge_phi3.api.openai import fields as openai_fields
from edge_phi3.api.openai import responses as openai_responses
from edge_phi3.api.openai import schemas as openai
from edge_phi3.api.openai import tools as openai_tools
from edge_phi3.generation.parameters import generate_kwargs_schema
from edge_phi3.version import __version__

JSON = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"
_ERRORS = {
    400: "The request is wrong; the sentence names the field and what is allowed.",
    401: "The service needs an API key (only where keys are set).",
    404: "No model of this name is served.",
    413: "The body is larger than --max-body-size.",
    415: "The body is not said to be JSON.",
    429: "The queue is full, or the rate limit is reached; Retry-After says when to try again.",
    500: "llama.cpp failed on the request, or the service met an error of its own.",
    503: "The model is not loaded yet, or the service is stopping.",
    504: "The request took longer than --request-timeout.",
}

_STREAM_TEXT = """With `"stream": true`: server-sent events. Each unnamed event holds a piece of generated text,
`{"index": 0, "text": "..."}`, with the number of its returned sequence; pieces never split a character. The event
`result` ends the stream and holds the plain response. An event `error` holds `{"detail": ...}` when the request failed
after the stream began. Beam modes send `result` alone. Lines that begin with a colon are comments that keep the
connection alive."""

_TEXT: JSON = {"schema": {"type": "string"}}
_REQUEST_ID: JSON = {
    "name": "X-Request-Id",
    "in": "header",
    "required": False,
    "description": "What logs call the request: 1 to 128 letters, digits and any of `._:/+=@-`. Made by the service "
    "when it is absent or anything else, and returned.",
    "schema": {"type": "string"},
}
_CHAT_EXAMPLES = files("edge_phi3.api") / "static" / "chat_examples.json"
_MODEL_NAME: JSON = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


@functools.lru_cache(maxsize=1)
def openapi_document(app: Litestar) -> JSON:
    """Return the document of an application.

    A handler's ``opt`` says what its signature does not: ``body``, the type of the request; ``needs_key``; ``errors``,
    its own status codes and what they mean.
    """
    modules = (schemas, openai, openai_fields, openai_tools, openai_responses)
    types = [each for module in modules for each in _structs(module)]
    _, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    components["GenerateKwargs"] = generate_kwargs_schema()
    kwargs = components["ChatRequest"]["properties"]["generate_kwargs"]
    kwargs["anyOf"] = [{"$ref": _REFERENCE.format(name="GenerateKwargs")}, {"type": "null"}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edge-phi3",
            "version": __version__,
            "description": "Phi-3-mini on llama.cpp, with the meaning of transformers' `generate`.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "tags": [
            {"name": "text", "description": "Text and tokens"},
            {"name": "operations", "description": "Health, metrics and versions"},
        ],
        "paths": _paths(app),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _structs(module: ModuleType) -> list[type[Struct]]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Struct) and value.__module__ == module.__name__
    ]


def _paths(app: Litestar) -> JSON:
    """Return every route but those of pages."""
    paths: JSON = {
        route.path.replace(":path}", "}"): {
            "post" if "body" in handler.opt else "get": _operation(route.path, handler)
            for handler in route.route_handlers
            if handler.resolve_include_in_schema()
        }
        for route in app.routes
        if isinstance(route, HTTPRoute)
    }
    chat = paths["/chat"]["post"]
    chat["requestBody"]["content"]["application/json"]["examples"] = json.loads(_CHAT_EXAMPLES.read_bytes())
    chat["responses"]["200"]["description"] = f"The answer. {_STREAM_TEXT}"
    paths["/"]["get"]["responses"]["307"] = {"description": "A browser, which prefers HTML, is sent to the playground."}
    paths["/v1/models/{name}"]["get"]["parameters"] += [_MODEL_NAME]
    return {path: item for path, item in paths.items() if item}


def _operation(path: str, handler: HTTPRouteHandler) -> JSON:
    """Return what a route does, by its handler's name, docstring, annotations and ``opt``."""
    body, needs_key = handler.opt.get("body"), handler.opt.get("needs_key")
    codes = [401, 503] * bool(needs_key) + [400, 413, 415, 429] * bool(body) + [404] * ("{" in path)
    content = _json(_struct_in(handler.parsed_fn_signature.return_type.annotation))
    if body and "stream" in body.__struct_fields__:
        codes += [500, 504]
        content["text/event-stream"] = {}
    if path.startswith("/metrics"):
        content |= dict.fromkeys(["text/plain", "application/openmetrics-text"], _TEXT)
    errors = {code: _ERRORS[code] for code in sorted(codes)} | handler.opt.get("errors", {})
    error = openai.OpenAIError if path.startswith("/v1/") else schemas.ErrorResponse
    responses = {200: _response("The answer.", content)}
    responses |= {code: _response(text, _json(error)) for code, text in errors.items()}
    if 429 in errors:
        responses[429]["headers"]["Retry-After"] = {"schema": {"type": "integer"}, "description": "Seconds."}
    operation: JSON = {
        "operationId": re.sub("_(.)", lambda match: match[1].upper(), handler.handler_name),
        "summary": inspect.cleandoc(handler.fn.__doc__ or "").partition("\n\n")[0],
        "tags": ["text" if needs_key else "operations"],
        "parameters": [_REQUEST_ID],
        "responses": {str(code): response for code, response in responses.items()},
    }
    if needs_key:
        operation["security"] = [{}, {"bearer": []}, {"key": []}]
    if body:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation


def _response(description: str, content: JSON) -> JSON:
    return {"description": description, "headers": {"X-Request-Id": _TEXT}, "content": content}


def _json(schema: type[Struct] | None) -> JSON:
    """Return the content of a body: none, or JSON."""
    return {} if schema is None else {"application/json": {"schema": {"$ref": _REFERENCE.format(name=schema.__name__)}}}


def _struct_in(annotation: Any) -> type[Struct] | None:
    """Return the first structure that an annotation names, such as that of a ``Response``."""
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        return annotation
    return next(filter(None, map(_struct_in, get_args(annotation))), None)
