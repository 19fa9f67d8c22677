"""The service as a process: a bound port, uvicorn on it, and a stop that lets running requests finish."""

import asyncio
import functools
import json
import os
import shlex
import socket
import sys
from collections.abc import Callable
from types import FrameType

import structlog
import uvicorn

from edge_phi3.api.app import create_service
from edge_phi3.api.connection import Connection
from edge_phi3.api.exchange import Exchanges
from edge_phi3.api.logs import configure_logging
from edge_phi3.api.service import Loader, Service
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.settings import Settings

logger = structlog.get_logger(__name__)

_FLUSH_SECONDS = 2
"""How long finished answers may take to reach their clients once everything else has stopped."""

_QUESTION = "<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n"


class ServerError(EdgePhi3Error):
    """The service cannot listen where it should."""


def run(settings: Settings, load: Loader, announce: Callable[[Service, str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    The port is bound first, so that probes are answered while the model is downloaded, converted or loaded. Once
    requests are taken, `announce` is called with the service's address.

    Raises:
        ServerError: the address cannot be bound.
        EdgePhi3Error: the model cannot be loaded.
    """
    configure_logging(settings.log_format, settings.log_level)
    if settings.api_key:
        logger.warning("other processes can see API keys in flags and variables; use --api-key-file")
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
    body = json.dumps(
        {"prompt": _QUESTION, "return_full_text": False, "generate_kwargs": {"do_sample": False}},
        separators=(",", ":"),
    )
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
        self._announce = announce
        self._announced = False
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
        if not self._announced and service.is_ready:
            self._announced = True
            self._announce()
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
