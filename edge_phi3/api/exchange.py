"""One HTTP request while it is answered: its id, what came of it, and a client that leaves before."""

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from edge_phi3.api.errors import ClientDisconnectedError
from edge_phi3.pipeline import GenerationOutput

_PROBED = frozenset({"/", "/health", "/healthz", "/livez", "/readyz", "/metrics", "/metrics/prometheus"})
_OPERATIONS = {"/chat": "text_completion", "/v1/completions": "text_completion"}
_OPERATIONS |= dict.fromkeys(("/v1/chat/completions", "/v1/responses"), "chat")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class Exchange:
    """What is known about a request while it is answered.

    Attributes:
        request_id: taken from ``X-Request-Id`` when that is a plain word, made here otherwise.
        started: the monotonic time of its arrival.
        seconds: from then to its end, 0 before.
        status: the status code sent, 0 before.
        error: the class of the error that ended it, also when it ended a stream that had begun.
        prompt: the request's text, kept only when prompts are logged.
        key: the name of the API key that it bears, if there is one.
        headers: those that the answer gets beside its own.
    """

    scope: HTTPScope
    request_id: str
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    status: int = 0
    error: str | None = None
    output: GenerationOutput | None = None
    prompt: str | None = None
    key: str | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The request's path."""
        return self.scope["path"]

    @property
    def operation(self) -> str | None:
        """OpenTelemetry's name for what a request for text does, None for others."""
        return _OPERATIONS.get(self.path)

    @property
    def is_probe(self) -> bool:
        """Whether probes and scrapers ask for it every few seconds: logged at the level debug, and never traced."""
        return self.path in _PROBED


class Exchanges:
    """The ASGI application, with an id for each request; `recorders` are called with each exchange that has ended."""

    def __init__(self, app: ASGIApp, recorders: Sequence[Callable[[Exchange], None]]) -> None:
        self.app = app
        self._recorders = recorders

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        given = (value for name, value in scope["headers"] if name == b"x-request-id" and _REQUEST_ID.fullmatch(value))
        request_id = next(given, b"") or uuid.uuid4().hex.encode()
        exchange = Exchange(scope, request_id.decode("ascii"))
        scope.setdefault("state", {})["exchange"] = exchange
        if scope["method"] == "HEAD":  # the answer of GET, of which the server sends the headers alone
            scope = {**scope, "method": "GET"}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *exchange.headers]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            exchange.seconds = time.perf_counter() - exchange.started
            for record in self._recorders:
                record(exchange)


def exchange_of(scope: Scope) -> Exchange:
    """Return the exchange that an ASGI scope belongs to."""
    return cast("Exchange", scope["state"]["exchange"])


@contextlib.asynccontextmanager
async def cancelled_when_client_leaves(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block as soon as the client closes its connection. The request's body has been read.

    Raises:
        ClientDisconnectedError: instead of the block's `asyncio.CancelledError`, when that was the reason.
    """
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientDisconnectedError("The client left before its answer was ready.") from None
        raise
    finally:
        watcher.cancel()
