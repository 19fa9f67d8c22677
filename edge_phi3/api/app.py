"""`create_app`: the service as one ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import anyio.to_thread
from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.stores.memory import MemoryStore

from edge_phi3.api import docs, ops, ui
from edge_phi3.api.auth import rate_limits
from edge_phi3.api.chat import chat
from edge_phi3.api.errors import EXCEPTION_HANDLERS
from edge_phi3.api.exchange import ExchangeLog
from edge_phi3.api.openai.chat import chat_completions
from edge_phi3.api.openai.completions import completions
from edge_phi3.api.openai.errors import EXCEPTION_HANDLERS as OPENAI_EXCEPTION_HANDLERS
from edge_phi3.api.openai.models import list_models, show_model
from edge_phi3.api.service import Loader, Service
from edge_phi3.api.tracing import tracing_of
from edge_phi3.settings import Settings


def create_service(settings: Settings, load: Loader) -> tuple[ExchangeLog, Service]:
    """Make the application together with its state, for whoever also stops it.

    Args:
        settings: the options.
        load: makes the pipeline, in a thread, once the application has started.

    Raises:
        TracingError: traces are asked for, and the extra ``otel`` is not installed.
    """
    service = Service(settings, load)
    tracing = tracing_of(settings)
    open_routes = Router(
        "/",
        route_handlers=[
            ops.home,
            ops.healthz,
            ops.livez,
            ops.readyz,
            ops.metrics,
            ops.prometheus,
            ops.show_version,
            *docs.HANDLERS,
            *ui.HANDLERS,
        ],
    )
    guarded_routes = Router(
        "/",
        route_handlers=[chat, ops.tokenize, ops.detokenize],
        guards=service.keys.guards(),
        middleware=rate_limits(settings.rate_limit, service.keys),
    )

    openai_routes = Router(
        "/",
        route_handlers=[chat_completions, completions, list_models, show_model],
        guards=service.keys.guards(),
        middleware=rate_limits(settings.rate_limit, service.keys),
        exception_handlers=OPENAI_EXCEPTION_HANDLERS,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()
        if tracing is not None:
            await anyio.to_thread.run_sync(tracing.close)

    app = Litestar(
        route_handlers=[open_routes, guarded_routes, openai_routes],
        dependencies={"service": Provide(lambda: service, sync_to_thread=False, use_cache=True)},
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=[lifespan],
        cors_config=_cors(settings),
        request_max_body_size=int(settings.max_body_size),
        stores={"rate_limit": MemoryStore()},
        openapi_config=None,
        logging_config=None,
    )
    return ExchangeLog(app, service.metrics, tracing), service


def create_app(settings: Settings, load: Loader) -> ExchangeLog:
    """Make the application; any ASGI server runs it.

    Args:
        settings: the options.
        load: makes the pipeline, in a thread, once the application has started.
    """
    app, _ = create_service(settings, load)
    return app


def _cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_origin:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origin),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )
