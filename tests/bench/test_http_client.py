"""The load generator's HTTP client, against servers of every manner."""

from __future__ import annotations

import asyncio

import pytest

from edge_phi3.bench.errors import BenchError, ExchangeError, StatusError
from edge_phi3.bench.http_client import HttpClient
from tests.bench.conftest import answering, read_request, replying, response, talk


def test_posts_json_and_hands_on_a_chunked_body_as_it_comes() -> None:
    pieces: list[bytes] = []
    seen: list[tuple[str, bytes]] = []
    half_read = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await half_read.wait()
        writer.write(b"2\r\nde\r\n0\r\n\r\n")
        await reader.read()

    def sink(piece: bytes) -> None:
        pieces.append(piece)
        half_read.set()

    talk(answer, lambda client: client.post("/chat", b'{"a":1}', sink), path="/base/")
    assert pieces == [b"abc", b"de"]
    assert seen == [("POST /base/chat HTTP/1.1", b'{"a":1}')]


def test_one_connection_serves_one_exchange_after_the_other() -> None:
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            line, _ = await read_request(reader)
            writer.write(response(line.encode()))

    async def ask(client: HttpClient) -> list[bytes]:
        bodies = [await client.get("/a"), await client.get("/b")]
        assert connections == 1
        return [*bodies, *await asyncio.gather(client.get("/c"), client.get("/d"))]

    assert talk(answer, ask) == [b"GET /%c HTTP/1.1" % letter for letter in b"abcd"]
    assert connections == 2


def test_an_idle_connection_that_the_server_gave_up_is_replaced() -> None:
    async def ask(client: HttpClient) -> list[bytes]:
        return [await client.get("/") for _ in range(3)]

    assert talk(replying(response(b"one")), ask) == [b"one"] * 3


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    server = replying(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it")
    assert talk(server, lambda client: client.get("/")) == b"all of it"


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (response(b'{"detail":"Full."}', "429 Too Many Requests"), 'HTTP 429: {"detail":"Full."}'),
        (response(b"", "503 Service Unavailable"), "HTTP 503"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "The server closed the connection before it answered."),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "The response is not HTTP/1.1"),
        (b"", "The server closed the connection before it answered."),
    ],
)
def test_failures_are_told(sent: bytes, message: str) -> None:
    with pytest.raises(ExchangeError) as failure:
        talk(replying(sent), lambda client: client.post("/chat", b"{}", lambda _: None))
    assert str(failure.value).startswith(message)


def test_a_refusal_keeps_the_connection_and_its_status() -> None:
    connections: list[object] = []
    replies = replying(response(b"busy", "429 Too Many Requests"), response(b"fine"))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await replies(reader, writer)

    async def ask(client: HttpClient) -> bytes:
        with pytest.raises(StatusError) as refusal:
            await client.get("/")
        assert refusal.value.status == 429
        return await client.get("/")

    assert talk(answer, ask) == b"fine"
    assert len(connections) == 1


def test_the_time_limit_ends_an_exchange_and_its_connection() -> None:
    left = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            assert await reader.read() == b""
        finally:
            left.set()

    async def ask(client: HttpClient) -> None:
        with pytest.raises(ExchangeError, match=r"No end of the response within 0\.2 s\."):
            await client.get("/")
        await asyncio.wait_for(left.wait(), 300)

    talk(answer, ask, timeout=0.2)


def test_the_key_is_sent() -> None:
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(response(b"ok"))

    talk(answer, lambda client: client.get("/"), api_key="secret")
    assert b"Authorization: Bearer secret\r\n" in heads[0]


def test_nobody_listens() -> None:
    async def scenario() -> None:
        async with answering(lambda _r, _w: asyncio.sleep(0)) as url:
            free = url
        await HttpClient(free).get("/")

    with pytest.raises(ExchangeError, match=r"No connection to http://127\.0\.0\.1:\d+: "):
        asyncio.run(scenario())


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BenchError, match="address"):
        HttpClient(url)


def test_an_address_without_a_scheme_is_http() -> None:
    assert HttpClient("localhost:8080").url == "http://localhost:8080"
