"""A real service on a small random model, and small servers that answer what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from edge_phi3.bench.http_client import HttpClient
from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.pipeline import TextGenerationPipeline
from tests.golden.checkpoints import write_checkpoint
from tests.golden.vocabularies import phi3_vocabulary
from tests.support.in_process import Running, ready

T = TypeVar("T")
Answering = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve a small random model with Phi-3's whole vocabulary at its real endpoints."""
    folder = tmp_path_factory.mktemp("bench")
    checkpoint = write_checkpoint(folder / "checkpoint", vocabulary=phi3_vocabulary(), layers=1)
    path = convert(checkpoint, folder / "tiny.gguf", outtype="f32").path
    with ready(functools.partial(_load, path)) as running:
        yield running


def _load(path: Path, _say: object) -> TextGenerationPipeline:
    engine = Engine(EngineSettings(path, threads=1))
    engine.load()
    return TextGenerationPipeline(engine)


@contextlib.asynccontextmanager
async def answering(answer: Answering) -> AsyncIterator[str]:
    """Run a server whose connections `answer` handles, and give its URL."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def talk(answer: Answering, ask: Callable[[HttpClient], Awaitable[T]], path: str = "", **options: Any) -> T:
    """Run a server whose connections `answer` handles, and return what `ask` makes of a client of it."""

    async def scenario() -> T:
        async with answering(answer) as url:
            client = HttpClient(url + path, **options)
            try:
                return await ask(client)
            finally:
                client.close()

    return asyncio.run(scenario())


def replying(*responses: bytes, seen: list[tuple[str, bytes]] | None = None) -> Answering:
    """Answer the requests of each connection with these, one after the other, and then close it.

    Args:
        responses: whole responses.
        seen: takes the first line and the body of every request.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for one in responses:
            request = await read_request(reader)
            if seen is not None:
                seen.append(request)
            writer.write(one)

    return answer


async def read_request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Read a request; give its first line and its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    lines = head.split("\r\n")
    lengths = [int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length")]
    return lines[0], await reader.readexactly(lengths[0]) if lengths else b""


def response(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """Give a whole response."""
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers])
    return head.encode() + b"\r\n\r\n" + body
