"""The interactive page of the API at ``/docs``, whose every file comes from the package itself."""

from __future__ import annotations

import gzip
from importlib.resources import files
from typing import Any

from litestar import Request, Response, get

from edge_phi3.api.openapi import openapi_document

_STATIC = files("edge_phi3.api") / "static"
_DAY = "public, max-age=86400"
_POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


@get("/openapi.json", sync_to_thread=False)
def openapi_json() -> Response[bytes]:
    """Give the OpenAPI document."""
    return Response(openapi_document(), media_type="application/vnd.oai.openapi+json; version=3.1")


@get("/docs", sync_to_thread=False)
def docs_page() -> Response[bytes]:
    """Show the OpenAPI document, with a form for each request."""
    page = (_STATIC / "docs.html").read_bytes()
    return Response(page, media_type="text/html", headers={"Content-Security-Policy": _POLICY})


@get("/docs/start.js", sync_to_thread=False)
def start_js() -> Response[bytes]:
    """Give the page's own script."""
    return Response((_STATIC / "start.js").read_bytes(), media_type="text/javascript")


@get("/docs/swagger-ui-bundle.js", sync_to_thread=False)
def bundle_js(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Give Swagger UI's script."""
    return _compressed(request, "swagger-ui-bundle.js", "text/javascript")


@get("/docs/swagger-ui.css", sync_to_thread=False)
def bundle_css(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Give Swagger UI's style sheet."""
    return _compressed(request, "swagger-ui.css", "text/css")


def _compressed(request: Request[Any, Any, Any], name: str, media_type: str) -> Response[bytes]:
    content = (_STATIC / f"{name}.gz").read_bytes()
    headers = {"Cache-Control": _DAY, "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
    else:
        content = gzip.decompress(content)
    return Response(content, media_type=media_type, headers=headers)


HANDLERS = [openapi_json, docs_page, start_js, bundle_js, bundle_css]
"""The page's routes."""
