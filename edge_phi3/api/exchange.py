"""One HTTP request while it is answered: its id, what came of it, a client that leaves, and an answer in events."""

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
from litestar.enums import ScopeType
from litestar.response.base import Response
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from edge_phi3.api.errors import (
    ClientDisconnectedError,
    detail_of,
    error_body,
    is_openai,
    log_unforeseen,
    status_code_of,
)
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.pipeline import GenerationOutput

_PROBED = frozenset({"/", "/health", "/healthz", "/livez", "/readyz", "/metrics", "/metrics/prometheus"})
_OPERATIONS = {"/chat": "text_completion", "/v1/completions": "text_completion"}
_OPERATIONS |= dict.fromkeys(("/v1/chat/completions", "/v1/responses"), "chat")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")

FIRST_EVENT_PATIENCE = 1.0
"""Seconds to wait for the first event before the status line is sent: refusals come at once and keep their own status,
while the client of a long prompt sees that it was accepted."""

KEEP_ALIVE_SECONDS = 15.0
"""After so much silence a comment is sent, so that proxies do not take the connection for dead."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Exchange:
    """What is known about a request while it is answered; its time in seconds and its status are 0 before the end.

    `started` is the monotonic time of its arrival, `error` the class of what ended it, also of what ended a stream that
    had begun. The `prompt` is kept only when prompts are logged; `key` is the name of the API key that it bears,
    `headers` are those of the answer beside its own.
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
    """Cancel the block once the client, whose body has been read, leaves: that is a `ClientDisconnectedError`."""
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


def event(content: object, name: str = "") -> bytes:
    """Return one event, whose data is its content as JSON, which holds no line break; bytes are sent as they are."""
    data = content if isinstance(content, bytes) else _encode(content)
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data) if name else b"data: %s\n\n" % data


class EventStream(Response[bytes]):
    """A response of server-sent events, encoded already.

    What they raise before the first is answered with its own status code; what they raise later makes the last one.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(content=b"", media_type="text/event-stream")
        self._events = events
        self._begun = False
        self._last = time.monotonic()

    def to_asgi_response(self, *_: Any, **__: Any) -> Any:
        """Return the ASGI application that sends the events: this one."""
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end, fail, or the client leaves."""
        keep_alive = asyncio.create_task(self._keep_alive(send))
        try:
            async with cancelled_when_client_leaves(receive), contextlib.aclosing(self._events):
                async for piece in self._events:
                    await self._send(send, piece)
        except Exception as error:
            keep_alive.cancel()
            if not self._begun:
                raise
            exchange_of(scope).error = type(error).__name__
            if isinstance(error, ClientDisconnectedError):
                return
            if not isinstance(error, EdgePhi3Error):
                log_unforeseen(scope, error)
            body = error_body(scope, detail_of(error), status_code_of(error))
            await self._send(send, event(body, "" if is_openai(scope) else "error"))
        finally:
            keep_alive.cancel()
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, piece: bytes, *, more: bool = True) -> None:
        self._last = time.monotonic()
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS]})
        await send({"type": "http.response.body", "body": piece, "more_body": more})

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment whenever nothing else was sent for too long."""
        while True:
            patience = KEEP_ALIVE_SECONDS if self._begun else FIRST_EVENT_PATIENCE
            if (wait := self._last + patience - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            else:
                await self._send(send, b": waiting\n\n")
