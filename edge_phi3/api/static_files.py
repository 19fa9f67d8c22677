"""The pages for browsers: the playground at ``/ui`` and the API's at ``/docs``, from files of the package alone."""

import functools
import gzip
import hashlib
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, Final

from litestar import Request, Response, get
from litestar.datastructures.headers import Accept
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath
from litestar.response import Redirect
from msgspec import Struct

from edge_phi3.api.openapi import openapi_document
from edge_phi3.api.service import Service
from edge_phi3.generation.parameters import generate_kwargs_schema, groups

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


@get("/openapi.json", sync_to_thread=False)
def openapi_json(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
    """Return the OpenAPI document."""
    return Response(openapi_document(request.app), media_type="application/vnd.oai.openapi+json; version=3.1")


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
"""The routes."""


def prefers_html(accept: str) -> bool:
    """Return whether an ``Accept`` header prefers a page to JSON, as those of browsers do and of clients do not."""
    try:
        return Accept(accept).best_match(["application/json", "text/html"]) == "text/html"
    except OverflowError:  # a weight of "inf"
        return False


class _Asset(Struct, frozen=True):
    content: bytes
    packed: bool
    media_type: str
    etag: str


@functools.cache
def _assets() -> dict[tuple[str, str], _Asset]:
    """Return every file by its folder and name; large ones are kept gzipped in the package."""
    found = {}
    for folder in _POLICIES:
        for file in (_STATIC / folder).iterdir():
            name = file.name.removesuffix(".gz")
            if media_type := _MEDIA_TYPES.get(PurePosixPath(name).suffix):
                content = file.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
                found[folder, name] = _Asset(content, name != file.name, media_type, etag)
    return found


def _file(request: Request[Any, Any, Any], folder: str, name: str) -> Response[Any]:
    asset = _assets().get((folder, name))
    if asset is None:
        raise NotFoundException
    headers = {
        # Those kept gzipped are Swagger UI's, which change with its version alone.
        "Cache-Control": "public, max-age=86400" if asset.packed else "no-cache",
        "Content-Security-Policy": _POLICIES[folder],
        "ETag": asset.etag,
        "Referrer-Policy": "no-referrer",
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("if-none-match") == asset.etag:
        return Response(b"", status_code=304, headers=headers)
    content = asset.content
    if asset.packed and "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
    elif asset.packed:
        content = gzip.decompress(content)
    return Response(content, media_type=asset.media_type, headers=headers)
