"""The pages for browsers: the playground at ``/ui`` and the API's at ``/docs``, from files of the package alone.

What the second shows is the OpenAPI document: every route, request, response and status code, made from the types that
the code uses.
"""

import functools
import gzip
import hashlib
import inspect
import json
import re
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, Final, get_args

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.datastructures.headers import Accept
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response import Redirect
from litestar.routes import HTTPRoute
from msgspec import Struct

from edge_phi3.api import schemas
from edge_phi3.api.openai import fields as openai_fields
from edge_phi3.api.openai import responses as openai_responses
from edge_phi3.api.openai import schemas as openai
from edge_phi3.api.openai import tools as openai_tools
from edge_phi3.api.service import Service
from edge_phi3.generation.parameters import generate_kwargs_schema, groups
from edge_phi3.version import __version__

_STATIC = files("edge_phi3.api") / "static"
_MEDIA_TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_POLICIES: Final = {
    "docs": "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "ui": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'; "
    # Texts can only ever be inserted as texts: the browser itself refuses to parse a string as HTML.
    "require-trusted-types-for 'script'; trusted-types 'none'",
}

ROOM_FOR_AN_ANSWER: Final = 512
"""New tokens in the playground's form at first: the API's default counts the prompt, which a conversation outgrows."""

JSON = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"
_STREAM_TEXT = """With `"stream": true`: server-sent events. Each unnamed event holds a piece of generated text,
`{"index": 0, "text": "..."}`, with the number of its returned sequence; pieces never split a character. The event
`result` ends the stream and holds the plain response. An event `error` holds `{"detail": ...}` when the request failed
after the stream began. Beam modes send `result` alone. Lines that begin with a colon are comments that keep the
connection alive."""

_TEXT: JSON = {"schema": {"type": "string"}}
_REQUEST_ID, _MODEL_NAME = ({"$ref": f"#/components/parameters/{name}"} for name in ("RequestId", "ModelName"))


@get("/openapi.json", sync_to_thread=False)
def openapi_json(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
    """Return the OpenAPI document."""
    return Response(_document(request.app), media_type="application/vnd.oai.openapi+json; version=3.1")


@get("/ui/config.json", sync_to_thread=False)
def playground_config(service: NamedDependency[Service]) -> Response[dict[str, Any]]:
    """Return what the playground needs to know of the service.

    ``initial`` is what a new visitor's form holds; counting tokens takes `return_dict_in_generate`. ``end_token_ids``
    end a sequence unless a request names others; there are none while the model loads.
    """
    room = min(ROOM_FOR_AN_ANSWER, service.settings.max_new_tokens or ROOM_FOR_AN_ANSWER)
    config = {
        "groups": [{"title": title, "parameters": names} for title, names in groups().items()],
        "parameters": generate_kwargs_schema()["properties"],
        "initial": {"max_new_tokens": room, "return_dict_in_generate": True},
        "needs_key": bool(service.keys),
        "end_token_ids": service.loaded.engine.model.defaults.eos_token_ids if service.loaded else (),
    }
    return Response(config, headers={"Cache-Control": "no-store"})


@get(["/docs", "/ui"], sync_to_thread=False)
def page(request: Request[Any, Any, Any]) -> Response[Any]:
    """Return the playground's page, or Swagger UI's, which shows the OpenAPI document with a form for each request."""
    folder = request.scope["path"].strip("/")
    if request.scope["raw_path"].endswith(b"/"):
        return Redirect(f"../{folder}", status_code=307)  # a page's links are relative to what its folder lies in
    return _file(request, folder, "index.html")


@get(["/docs/{name:str}", "/ui/{name:str}"], sync_to_thread=False)
def static_file(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[Any]:
    """Return one of the files that a page loads."""
    return _file(request, request.scope["path"].split("/")[1], name)


HANDLERS = [openapi_json, playground_config, page, static_file]


def prefers_html(accept: str) -> bool:
    """Return whether an ``Accept`` header prefers a page to JSON, as those of browsers do and of clients do not."""
    try:
        return Accept(accept).best_match(["application/json", "text/html"]) == "text/html"
    except OverflowError:  # a weight of "inf"
        return False


@functools.cache
def _assets() -> dict[tuple[str, str], tuple[bytes, bool, str, str]]:
    """Return each file's content, whether it is gzipped, its type and its tag, by its folder and name."""
    found = {}
    for folder in _POLICIES:
        for file in (_STATIC / folder).iterdir():
            name = file.name.removesuffix(".gz")
            if media_type := _MEDIA_TYPES.get(PurePosixPath(name).suffix):
                content = file.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                found[folder, name] = content, name != file.name, media_type, etag
    return found


def _file(request: Request[Any, Any, Any], folder: str, name: str) -> Response[Any]:
    if (folder, name) not in _assets():
        raise NotFoundException
    content, packed, media_type, etag = _assets()[folder, name]
    headers = {
        # Those kept gzipped are Swagger UI's, which change with its version alone.
        "Cache-Control": "public, max-age=86400" if packed else "no-cache",
        "Content-Security-Policy": _POLICIES[folder],
        "ETag": etag,
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("if-none-match") == etag:
        return Response(b"", status_code=304, headers=headers)
    if packed and "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
    elif packed:
        content = gzip.decompress(content)
    return Response(content, media_type=media_type, headers=headers)


@functools.lru_cache(maxsize=1)
def _document(app: Litestar) -> JSON:
    """Return the document of an application.

    A handler's ``opt`` says what its signature does not: ``body``, the type of the request; ``needs_key``; ``errors``,
    its own status codes and what they mean.
    """
    modules = (schemas, openai, openai_fields, openai_tools, openai_responses)
    types = [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Struct) and each.__module__ == module.__name__
    ]
    _, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    components["GenerateKwargs"] = generate_kwargs_schema()
    kwargs = components["ChatRequest"]["properties"]["generate_kwargs"]
    kwargs["anyOf"] = [{"$ref": _REFERENCE.format(name="GenerateKwargs")}, {"type": "null"}]
    document: JSON = _data("openapi")
    document["info"]["version"], document["paths"] = __version__, _paths(app)
    document["components"]["schemas"] = components
    return document


def _data(name: str) -> Any:
    return json.loads((_STATIC / f"{name}.json").read_bytes())


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
    chat["requestBody"]["content"]["application/json"]["examples"] = _data("chat_examples")
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
    known = _data("openapi")["components"]["responses"]
    errors = {code: known[str(code)]["description"] for code in sorted(codes)} | handler.opt.get("errors", {})
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
