"""The service as one ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from litestar import Litestar, Request, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from litestar.middleware.rate_limit import DurationUnit, RateLimitConfig
from litestar.stores.memory import MemoryStore

from edge_phi3.api import chat, ops, static_files
from edge_phi3.api.auth import KeyRing
from edge_phi3.api.errors import EXCEPTION_HANDLERS
from edge_phi3.api.exchange import Exchange, Exchanges
from edge_phi3.api.logs import log_exchange
from edge_phi3.api.openai import routes as openai
from edge_phi3.api.service import Loader, Service
from edge_phi3.api.tracing import tracing_of
from edge_phi3.settings import Settings


def create_service(settings: Settings, load: Loader) -> tuple[Exchanges, Service]:
    """Make the application, which any ASGI server runs, together with its state, for whoever also stops it.

    Raises:
        TracingError: traces are configured, and the extra ``otel`` is not installed.
    """
    service = Service(settings, load)
    recorders: list[Callable[[Exchange], None]] = [service.metrics.record, log_exchange]
    if (tracing := tracing_of(settings)) is not None:
        recorders.append(lambda exchange: tracing.record(exchange, service.metrics.model_name))
    guarded: dict[str, Any] = {
        "guards": [service.keys.guard] if service.keys else [],
        "middleware": _rate_limit(settings.rate_limit, service.keys),
        "opt": {"needs_key": True},
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = Litestar(
        route_handlers=[
            Router("/", route_handlers=ops.OPEN),
            Router("/", route_handlers=static_files.HANDLERS, include_in_schema=False),
            Router("/", route_handlers=[chat.chat, *ops.GUARDED, *openai.HANDLERS], **guarded),
        ],
        dependencies={"service": Provide(lambda: service, sync_to_thread=False, use_cache=True)},
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=[lifespan],
        cors_config=_cors(settings),
        request_max_body_size=int(settings.max_body_size),
        stores={"rate_limit": MemoryStore()},
        openapi_config=None,
        logging_config=None,
    )
    return Exchanges(app, recorders), service


def _rate_limit(limit: str | None, keys: KeyRing) -> list[DefineMiddleware]:
    """Return the middleware that holds each key, or each address without keys, to ``N/UNIT`` requests."""
    if limit is None:
        return []
    count, unit = limit.split("/")

    def identify(request: Request[Any, Any, Any]) -> str:
        number = keys.find(request) if keys else None
        # A wrong key counts for the address, or guessing keys would be free of the limit.
        return f"key:{number}" if number is not None else f"address:{request.client.host if request.client else ''}"

    rate = (cast("DurationUnit", unit), int(count))
    return [RateLimitConfig(rate_limit=rate, identifier_for_request=identify).middleware]


def _cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_origin:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origin),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )
