"""Server-sent events: a response that begins with its first event, and that an early failure keeps its status code."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from litestar.response.base import Response
from litestar.types import Receive, Scope, Send

from edge_phi3.api.errors import (
    ClientDisconnectedError,
    detail_of,
    error_body,
    is_openai,
    log_unforeseen,
    status_code_of,
)
from edge_phi3.api.exchange import cancelled_when_client_leaves, exchange_of
from edge_phi3.errors import EdgePhi3Error

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
