"""The service as one ASGI application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.types import Guard

from edge_phi3.api import chat, ops, static_files
from edge_phi3.api.errors import EXCEPTION_HANDLERS
from edge_phi3.api.exchange import Exchange, Exchanges
from edge_phi3.api.hosts import HostList
from edge_phi3.api.logs import log_exchange
from edge_phi3.api.openai import routes as openai
from edge_phi3.api.rate_limit import RATE_HEADERS, RateLimiter
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
    guards: list[Guard] = []
    if settings.rate_limit is not None:
        guards.append(RateLimiter(settings.rate_limit, service.keys).guard)
    if service.keys:
        guards.append(service.keys.guard)

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
            Router(
                "/", route_handlers=[chat.chat, *ops.GUARDED, *openai.HANDLERS], guards=guards, opt={"needs_key": True}
            ),
        ],
        dependencies={"service": Provide(lambda: service, sync_to_thread=False, use_cache=True)},
        guards=[HostList(settings).guard],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=[lifespan],
        cors_config=_cors(settings),
        request_max_body_size=int(settings.max_body_size),
        openapi_config=None,
        logging_config=None,
    )
    return Exchanges(app, recorders), service


def _cors(settings: Settings) -> CORSConfig | None:
    if not settings.cors_origin:
        return None
    return CORSConfig(
        allow_origins=list(settings.cors_origin),
        allow_methods=["GET", "POST"],
        expose_headers=["X-Request-Id", "X-Ignored-Fields", "Retry-After", *RATE_HEADERS],
    )
