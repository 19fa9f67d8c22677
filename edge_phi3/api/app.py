"""`create_app`: the service as one ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, cast

from litestar import Litestar, Request, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from litestar.middleware.rate_limit import DurationUnit, RateLimitConfig
from litestar.stores.memory import MemoryStore

from edge_phi3.api import ops, static_files
from edge_phi3.api.access_log import AccessLog
from edge_phi3.api.auth import KeyRing
from edge_phi3.api.chat import chat
from edge_phi3.api.errors import EXCEPTION_HANDLERS
from edge_phi3.api.openai.chat import chat_completions
from edge_phi3.api.openai.completions import completions
from edge_phi3.api.openai.errors import EXCEPTION_HANDLERS as OPENAI_EXCEPTION_HANDLERS
from edge_phi3.api.openai.models import list_models, show_model
from edge_phi3.api.service import Loader, Service
from edge_phi3.api.tracing import tracing_of
from edge_phi3.settings import Settings


def create_service(settings: Settings, load: Loader) -> tuple[AccessLog, Service]:
    """Make the application together with its state, for whoever also stops it.

    Args:
        settings: the options.
        load: makes the pipeline, in a thread, once the application has started.

    Raises:
        TracingError: traces are configured, and the extra ``otel`` is not installed.
    """
    service = Service(settings, load)
    tracing = tracing_of(settings)
    guarded: dict[str, Any] = {
        "guards": service.keys.guards(),
        "middleware": _rate_limit(settings.rate_limit, service.keys),
    }
    routers = [
        Router("/", route_handlers=[*ops.HANDLERS, *static_files.HANDLERS]),
        Router("/", route_handlers=[chat, ops.tokenize, ops.detokenize], **guarded),
        Router(
            "/",
            route_handlers=[chat_completions, completions, list_models, show_model],
            exception_handlers=OPENAI_EXCEPTION_HANDLERS,
            **guarded,
        ),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = Litestar(
        route_handlers=routers,
        dependencies={"service": Provide(lambda: service, sync_to_thread=False, use_cache=True)},
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=[lifespan],
        cors_config=_cors(settings),
        request_max_body_size=int(settings.max_body_size),
        stores={"rate_limit": MemoryStore()},
        openapi_config=None,
        logging_config=None,
    )
    return AccessLog(app, service.metrics, tracing), service


def create_app(settings: Settings, load: Loader) -> AccessLog:
    """Make the application; any ASGI server runs it.

    Args:
        settings: the options.
        load: makes the pipeline, in a thread, once the application has started.
    """
    app, _ = create_service(settings, load)
    return app


def _rate_limit(limit: str | None, keys: KeyRing) -> list[DefineMiddleware]:
    """Return the middleware that holds each key, or each address without keys, to ``N/UNIT`` requests."""
    if limit is None:
        return []
    count, unit = limit.split("/")

    def identify(request: Request[Any, Any, Any]) -> str:
        number = keys.find(request) if keys else None
        # A wrong key counts for the address, or guessing keys would be free of the limit.
        return f"key:{number}" if number is not None else f"address:{request.client.host if request.client else ''}"

    config = RateLimitConfig(
        rate_limit=(cast("DurationUnit", unit), int(count)),
        identifier_for_request=identify,
    )
    return [config.middleware]


def _cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_origin:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origin),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )
