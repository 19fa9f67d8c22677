"""One HTTP connection: uvicorn's protocol on h11, with bounds of size, time and number.

A client can take a bounded time to send its headers and its body and to read its answer. When there are too many
connections, the one whose client has owed something for longest goes, so that idle ones keep nobody out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
from typing import Any, Final, Literal, cast

import h11
import msgspec
import structlog
from litestar.types import Scope
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from edge_phi3.api.errors import error_body
from edge_phi3.settings import Settings

logger = structlog.get_logger(__name__)

Owed = Literal["headers", "body", "reading", "another request"]
"""What a connection waits for its client to do."""

_LINGER: Final = 2.0
"""Seconds in which what a refused client still sends is thrown away: closed at once, it might never see the refusal."""

FREE_CHUNKS: Final = 4096
_LEAST_CHUNK: Final = 16
"""How many chunks a body may have of any size, and how many bytes more of them must have on average: parsing a chunk
takes as long as copying thousands of bytes."""

_FORM_OF_PROXIES: Final = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


class Connection(H11Protocol):
    """The connection of one client.

    Offers to upgrade, such as that of HTTP/2 in every request of Java's client, are passed over.
    """

    conn: _Parser

    def __init__(self, settings: Settings, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.conn = _Parser(int(settings.max_header_size))
        self.owed: Owed | None = None
        self.since = 0.0
        self._limit = settings.max_connections
        self._patience: dict[Owed | None, float] = {
            "headers": settings.header_timeout,
            "body": settings.body_timeout,
            "reading": settings.send_timeout,
        }
        self._timer: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Wait for the headers of a request, and make room if this connection is one too many."""
        super().connection_made(transport)
        if self.client is not None:
            # On a socket for both kinds of addresses, that of IPv4 is dressed as one of IPv6.
            self.client = (self.client[0].removeprefix("::ffff:"), self.client[1])
        self._watch()
        others = cast("set[Connection]", self.connections) - {self} if len(self.connections) > self._limit else set()
        if waiting := [other for other in others if other.owed is not None]:
            min(waiting, key=lambda other: other.since).transport.abort()
        elif others:
            self._refuse(503, f"The service has {self._limit} connections, which is all it takes (--max-connections).")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the client."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._set_timer(0)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        # Behind its last request there is nothing, but for an empty line.
        if not self._refused and self.conn.their_state is not h11.MUST_CLOSE:
            super().data_received(data)
            self._read_on()

    def on_response_complete(self) -> None:
        """Wait for the next request, or begin with it."""
        super().on_response_complete()
        self._read_on()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nobody asks anything on."""
        super().timeout_keep_alive_handler()
        self._watch()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        self._watch()

    def shutdown(self) -> None:
        """Close, now or after the answer that is being given."""
        if self._refused:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words, which are always the same
        """Refuse what is not HTTP, or too large, and say which."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        large = f"The request line and headers take more than {self.conn.max_head} bytes (--max-header-size)."
        self._refuse(status, large if status == 431 else f"This is not a valid HTTP request: {error}.")

    def _should_upgrade(self) -> bool:
        return False

    def _read_on(self) -> None:
        """Read behind a request, up to a limit: or a client that has sent its next one could not be seen to leave."""
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < self.conn.max_head:
            self.flow.resume_reading()
        self._watch()

    # -- what the client owes

    def _owed(self) -> Owed | None:
        closing = self.transport.is_closing()
        if self.flow.write_paused or (closing and self.transport.get_write_buffer_size()):
            return "reading"
        if closing:
            return None
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        return "headers" if self.timeout_keep_alive_task is None else "another request"

    def _watch(self) -> None:
        """Start the time of what the client owes now, unless it runs already."""
        owed = self._owed()
        if owed != self.owed and not self._refused:
            self.owed, self.since = owed, self.loop.time()
            self._set_timer(self._patience.get(owed, 0))

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._late) if seconds else None

    def _late(self) -> None:
        if self._refused or self.owed == "reading":
            self.transport.abort()
        elif self.owed == "headers" and not self.conn.trailing_data[0]:
            self.transport.close()  # it never asked for anything
        else:
            option = "--header-timeout" if self.owed == "headers" else "--body-timeout"
            self._refuse(408, f"The request's {self.owed} took too long to arrive ({option}).")

    def _refuse(self, status: int, detail: str) -> None:
        """Answer a request that the application does not get to see, or not whole, and close."""
        self._refused, self.owed = True, None
        # That of the request before when this one was not read so far; a client mostly asks for one kind of thing.
        scope = cast("Scope | None", self.scope) or cast("Scope", {"path": ""})
        body = msgspec.json.encode(error_body(scope, detail, status))
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        logger.info("refused", status=status, detail=detail, client=self.client and self.client[0])
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        try:
            head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (head, h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.write_eof()
        except h11.LocalProtocolError:  # an answer has begun
            self.transport.abort()
        self._set_timer(_LINGER)


class _Parser(h11.Connection):
    """h11's parser of requests, which holds a head to its limit however it arrives, and chunks to a decent size.

    A request in the form that proxies are sent, with a whole URL, becomes one of the usual form.
    """

    def __init__(self, max_head: int) -> None:
        super().__init__(h11.SERVER, max_head)
        self.max_head = max_head
        self._chunks = self._bytes = 0

    def next_event(self) -> Any:
        """Return the next part of a request; `h11.RemoteProtocolError` when it is beyond a limit."""
        # Some clients send an empty line behind a body: in front of the next request (RFC 9112, 2.2).
        if self.their_state is h11.IDLE:
            waiting = self.trailing_data[0]
            self._receive_buffer.maybe_extract_at_most(len(waiting) - len(waiting.lstrip(b"\r\n")))
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks += bool(event.chunk_start)
            self._bytes += len(event.data)
            if self._chunks > FREE_CHUNKS and self._bytes < self._chunks * _LEAST_CHUNK:
                raise h11.RemoteProtocolError("its chunks are too small")
        elif isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
            size = (
                len(event.method) + len(event.target) + sum(len(name) + len(value) + 4 for name, value in event.headers)
            )
            if size > self.max_head:
                raise h11.RemoteProtocolError("too large", error_status_hint=431)
            if whole := _FORM_OF_PROXIES.match(event.target):
                rest = event.target[whole.end() :]
                return dataclasses.replace(event, target=rest if rest.startswith(b"/") else b"/" + rest)
        return event
