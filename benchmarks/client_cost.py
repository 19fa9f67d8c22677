"""Processor time that reading a streamed token costs the load generator, with its own client and with httpx.

    python -m benchmarks.client_cost

A server in a process of its own streams events one by one, as a generation server does, to several clients at once.
What the clients cost is missing on the machine that they measure, when it is the same one.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import httpx
import uvloop
from rich.console import Console
from rich.table import Table

from edge_phi3.bench.answers import Answer, EventReader
from edge_phi3.bench.http_client import HttpClient
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.targets import ChatTarget

_EVENT = b'data: {"index":0,"text":" word"}\n\n'
_LAST = b'event: result\ndata: {"Result":"","usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
_PAUSE = 0.002

Read = Callable[[str], Awaitable[int]]


def serve(events: int, tell: Connection) -> None:
    """Answer every request with `events` events, one at a time."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n")
        for _ in range(events):
            writer.write(b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT))
            await asyncio.sleep(_PAUSE)
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(_LAST), _LAST))
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        tell.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(run())


async def with_ours(url: str) -> int:
    """Read one stream with the load generator's client; give its pieces."""
    client, answer = HttpClient(url), Answer()
    await client.post("/chat", b"{}", EventReader(answer, ChatTarget(client).on_event).feed)
    client.close()
    return len(answer.times)


async def with_httpx(url: str) -> int:
    """Read one stream with httpx and the same reader of events; give its pieces."""
    answer = Answer()
    reader = EventReader(answer, ChatTarget(HttpClient(url)).on_event)
    async with (
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        client.stream("POST", "/chat", content=b"{}") as reply,
    ):
        async for data in reply.aiter_bytes():
            reader.feed(data)
    return len(answer.times)


async def cost(read: Read, url: str, clients: int) -> float:
    """Give the microseconds of processor time for each piece, over `clients` streams at once."""
    before = time.process_time()
    pieces = await asyncio.gather(*(read(url) for _ in range(clients)))
    return (time.process_time() - before) / sum(pieces) * 1e6


def main() -> None:
    """Measure in turns, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    machine = Machine.here()
    hear, tell = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(arguments.events, tell), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{hear.recv()}"
    readers: dict[str, Read] = {"httptools on a bare protocol": with_ours, "httpx": with_httpx}
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(arguments.rounds):
        for name, read in readers.items():
            found[name].append(uvloop.run(cost(read, url, arguments.clients)))
    server.terminate()
    table = Table("client", "median", "lowest", "highest", title="microseconds per streamed token", box=None)
    for name, values in found.items():
        values.sort()
        table.add_row(name, *(f"{value:.0f}" for value in (values[len(values) // 2], values[0], values[-1])))
    print(machine)
    Console().print(table)


if __name__ == "__main__":
    main()
