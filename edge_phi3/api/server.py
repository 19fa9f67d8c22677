"""The service: one ASGI application, a bound port, uvicorn on it, and a stop that lets running requests finish."""

import asyncio
import contextlib
import functools
import json
import os
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Callable
from types import FrameType

import structlog
import uvicorn
from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.types import Guard

from edge_phi3.api import chat, ops, static_files
from edge_phi3.api.connection import Connection
from edge_phi3.api.errors import EXCEPTION_HANDLERS
from edge_phi3.api.exchange import Exchange, Exchanges
from edge_phi3.api.guards import RATE_HEADERS, HostList, RateLimiter
from edge_phi3.api.logs import configure_logging, log_exchange
from edge_phi3.api.openai import routes as openai
from edge_phi3.api.service import Loader, Service
from edge_phi3.api.tracing import tracing_of
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.process import may_open
from edge_phi3.settings import Settings

logger = structlog.get_logger(__name__)

_FLUSH_SECONDS = 2
"""How long finished answers may take to reach their clients once everything else has stopped."""

_OWN_FILES = 40
"""Files that a service has open beside its connections: 17 at rest, and what its workers, logs and scrapes take."""


class ServerError(EdgePhi3Error):
    """The service cannot listen where it should."""


def run(settings: Settings, load: Loader, announce: Callable[[Service, str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `ServerError` when the address cannot be bound, and what `load` raises.

    The port is bound first, so that probes are answered while the model is downloaded, converted or loaded. Once
    requests are taken, `announce` is called with the service's address.
    """
    configure_logging(settings.log_format, settings.log_level)
    if settings.api_key:
        logger.warning("other processes can see API keys in flags and variables; use --api-key-file")
    connections = may_open(settings.max_connections + _OWN_FILES) - _OWN_FILES
    if connections < settings.max_connections:
        logger.warning("few files may be open here: raise `ulimit -n`", connections=connections)
        settings = settings.model_copy(update={"max_connections": connections})
    app, service = create_service(settings, load)
    with _bind(settings.host, settings.port) as listener:
        server = _Server(uvicorn_config(app, settings), service, lambda: announce(service, address_of(listener)))
        logger.info("listening", url=address_of(listener), model=settings.model)
        server.run(sockets=[listener])
    stopped = service.close()
    if service.failure is not None:
        raise service.failure
    logger.info("stopped")
    if not stopped:
        # A step of the loading goes on in C++ and cannot be stopped; to tear down the interpreter under it could
        # crash, and what it writes is unfinished and known as such.
        sys.stderr.flush()
        os._exit(0)


def create_service(settings: Settings, load: Loader) -> tuple[Exchanges, Service]:
    """Return the application, which any ASGI server runs, and its state; raises as `tracing_of`."""
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
        cors_config=CORSConfig(
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST"],
            expose_headers=["X-Request-Id", "X-Ignored-Fields", "Retry-After", *RATE_HEADERS],
        )
        if settings.cors_origin
        else None,
        request_max_body_size=int(settings.max_body_size),
        openapi_config=None,
        logging_config=None,
    )
    return Exchanges(app, recorders), service


def uvicorn_config(app: Exchanges, settings: Settings) -> uvicorn.Config:
    """Return how uvicorn runs the application."""
    return uvicorn.Config(
        app,
        http=functools.partial(Connection, settings),  # type: ignore[arg-type] # uvicorn calls it
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type] # a timer's seconds
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        ws="none",
    )


def address_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def example_command(url: str) -> str:
    """Return a curl command that asks the service at `url` a question."""
    question = "<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n"
    asked = {"prompt": question, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    body = json.dumps(asked, separators=(",", ":"))
    local = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    return f"curl -X POST {local}/chat -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if host == "::" and not socket.has_dualstack_ipv6():
            family, address = socket.AF_INET, ("0.0.0.0", port)  # noqa: S104 - what was asked for, as far as there is any
    except OSError as error:
        raise ServerError(f"--host: {host!r} is no address of this machine: {error.strerror}.") from None
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Inherited by every connection: a body must not wait for the acknowledgement of its headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # `::` listens on IPv4 too
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ServerError(
            f"Port {port} on {host} cannot be listened on: {error.strerror}. Choose another with --port or --host."
        ) from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn, with a first signal that drains and a second that does not wait.

    While requests finish, the port stays open: new requests, and probes, learn that the service is stopping.
    """

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._announce: Callable[[], None] | None = announce
        self._signals = 0
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of a handler
        """Count a signal; `on_tick` acts on it."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Announce, drain or stop when the time has come; called ten times a second. True ends the service."""
        await super().on_tick(counter)
        service = self._service
        if service.failure is not None:
            return True
        if self._announce is not None and service.is_ready:
            self._announce()
            self._announce = None
        if self._signals == 0:
            return False
        if self._drain is None:
            logger.info("stopping", grace_seconds=service.settings.grace_period)
            self._drain = asyncio.create_task(service.drain())
            await asyncio.sleep(0)
        if self._signals > 1:
            self._drain.cancel()
            await asyncio.to_thread(service.close, 0.0)
            return True
        return self._drain.done()
