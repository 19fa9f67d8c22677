"""A small HTTP/1.1 client for load generation: kept-alive connections, bodies handed on as they arrive.

The generator often shares the machine with the server that it measures, so that every cycle it spends is missing
there. httptools (the C parser under uvicorn, a dependency already) on a bare asyncio protocol calls one function per
network read, with no task switch and no copy of headers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

from edge_phi3.bench.errors import BenchError, ExchangeError, StatusError

Sink = Callable[[bytes], None]
"""Takes a piece of a body, at the moment at which it is read from the network."""

_DETAIL_LENGTH = 300
_STALE = "The server closed the connection before it answered."


class _Connection(asyncio.Protocol):
    """One connection, on which one exchange at a time takes place."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[int] | None = None
        self._sink: Sink | None = None
        self._refused = bytearray()
        self._framed = False
        self.received = False

    @property
    def is_open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Send a request, and hand its response's body to `sink`.

        Raises:
            StatusError: the status is not 200; the body goes into the message.
            ExchangeError: the connection broke.
        """
        if self._transport is None or self._transport.is_closing():
            raise ExchangeError(_STALE)
        self._sink, self.received, self._framed = sink, False, False
        self._refused.clear()
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        status = await self._done
        if status != 200:
            raise StatusError(status, self._refused.decode(errors="replace")[:_DETAIL_LENGTH].strip())

    def close(self) -> None:
        """Close at once; the server sees that the client has left."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class is one in all but name

    def data_received(self, data: bytes) -> None:
        self.received = True
        if self._done is None or self._done.done():
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            # What the sink made of the body, wrapped by httptools.
            cause = error.__context__
            self._fail(cause if isinstance(cause, ExchangeError) else error)
            self.close()
        except httptools.HttpParserError as error:
            self._fail(ExchangeError(f"The response is not HTTP/1.1: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done() and self.received and not self._framed:
            self.on_message_complete()  # a body without a length ends with its connection
        self._fail(ExchangeError(f"The connection broke: {exc}" if exc else _STALE))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # -- httptools

    def on_header(self, name: bytes, value: bytes) -> None:  # noqa: ARG002 - httptools' signature
        if name.lower() in {b"content-length", b"transfer-encoding"}:
            self._framed = True

    def on_body(self, body: bytes) -> None:
        if self._sink is not None and self._parser.get_status_code() == 200:
            self._sink(body)
        else:
            self._refused += body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        if not self._parser.should_keep_alive():
            self._transport.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._parser.get_status_code())


class HttpClient:
    """Connections to one server, as many as there are exchanges at once.

    Args:
        url: address of the server, such as ``http://127.0.0.1:8080``; a path is put in front of every path asked for.
        api_key: sent as a bearer token.
        timeout: seconds that an exchange may take.

    Raises:
        BenchError: the address is not one of an HTTP server.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            self._host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise BenchError(f"{url!r} is not an address: {error}.") from None
        if parts.scheme not in {"http", "https"} or not self._host:
            raise BenchError(f"{url!r} is not the address of an HTTP server; give one like http://127.0.0.1:8080.")
        self._tls = parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/")
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept: */*\r\n"
        if api_key:
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._timeout = timeout
        self._idle: list[_Connection] = []
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"

    async def post(self, path: str, body: bytes, sink: Sink) -> None:
        """Post JSON, and hand the response's body to `sink` piece by piece.

        Raises:
            StatusError: the status is not 200.
            ExchangeError: no connection, a broken one, or no end within the time limit.
        """
        head = f"POST {self._base}{path} HTTP/1.1\r\n{self._head}Content-Type: application/json\r\n"
        await self._exchange(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, sink)

    async def post_whole(self, path: str, body: bytes) -> bytes:
        """Post JSON and return the whole body of the response; raises as `post` does."""
        whole = bytearray()
        await self.post(path, body, whole.extend)
        return bytes(whole)

    async def get(self, path: str) -> bytes:
        """Return the body behind a path; raises as `post` does."""
        whole = bytearray()
        await self._exchange(f"GET {self._base}{path} HTTP/1.1\r\n{self._head}\r\n".encode(), whole.extend)
        return bytes(whole)

    async def _exchange(self, request: bytes, sink: Sink) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._exchange_on_some_connection(request, sink)
        except TimeoutError:
            raise ExchangeError(f"No end of the response within {self._timeout:g} s.") from None

    async def _exchange_on_some_connection(self, request: bytes, sink: Sink) -> None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_open:
                continue
            try:
                await self._exchange_on(connection, request, sink)
            except StatusError:
                raise
            except ExchangeError:
                if connection.received:
                    raise
                continue  # the server had given up the idle connection: that is no failure of its
            return
        await self._exchange_on(await self._connect(), request, sink)

    async def _exchange_on(self, connection: _Connection, request: bytes, sink: Sink) -> None:
        try:
            await connection.exchange(request, sink)
        except StatusError:
            self._keep(connection)
            raise
        except BaseException:
            connection.close()
            raise
        self._keep(connection)

    def _keep(self, connection: _Connection) -> None:
        if connection.is_open:
            self._idle.append(connection)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls or None)
        except OSError as error:
            raise ExchangeError(f"No connection to {self.url}: {error.strerror or error}.") from None
        return connection

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            with contextlib.suppress(RuntimeError):
                self._idle.pop().close()
