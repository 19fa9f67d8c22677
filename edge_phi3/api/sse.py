"""Server-sent events: a response that begins with its first event, and that an early failure keeps its status code."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from litestar.response.base import ASGIResponse, Response
from litestar.types import Receive, Scope, Send

from edge_phi3.api.errors import ClientDisconnectedError
from edge_phi3.api.exchange import cancelled_when_client_leaves, exchange_of

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


def event(data: bytes, name: str = "") -> bytes:
    """Return one event; `data` is JSON, so it holds no line break."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data) if name else b"data: %s\n\n" % data


class EventStream(Response[bytes]):
    """A response of server-sent events.

    Args:
        events: the events, encoded. What it raises before its first event is answered with its own status code.
        failed: makes the last event from what `events` raises later.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], failed: Callable[[Exception], bytes]) -> None:
        super().__init__(content=b"", media_type="text/event-stream")
        self._events = events
        self._failed = failed

    def to_asgi_response(self, *_: Any, **__: Any) -> ASGIResponse:
        """Return the ASGI application that sends the events."""
        return _ASGIEventStream(self._events, self._failed)


class _ASGIEventStream(ASGIResponse):
    def __init__(self, events: AsyncGenerator[bytes, None], failed: Callable[[Exception], bytes]) -> None:
        super().__init__()
        self._events = events
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end, fail, or the client leaves."""
        body = _Body(send)
        keep_alive = asyncio.create_task(body.keep_alive())
        try:
            async with cancelled_when_client_leaves(receive), contextlib.aclosing(self._events):
                async for piece in self._events:
                    await body.send(piece)
        except Exception as error:
            keep_alive.cancel()
            if not body.started:
                raise
            exchange_of(scope).error = type(error).__name__
            if isinstance(error, ClientDisconnectedError):
                return
            await body.send(self._failed(error))
        finally:
            keep_alive.cancel()
        await body.send(b"", more=False)


class _Body:
    """A response body that begins with its first piece, or with a comment when that is long in coming."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._last = time.monotonic()

    async def send(self, piece: bytes, *, more: bool = True) -> None:
        self._last = time.monotonic()
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    async def keep_alive(self) -> None:
        patience = FIRST_EVENT_PATIENCE
        while True:
            await asyncio.sleep(max(0.0, self._last + patience - time.monotonic()))
            if self.started:
                patience = KEEP_ALIVE_SECONDS
            if time.monotonic() - self._last >= patience:
                await self.send(b": waiting\n\n")
                patience = KEEP_ALIVE_SECONDS
