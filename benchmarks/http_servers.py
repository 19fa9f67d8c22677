"""The service on each HTTP server that could run it: requests and streamed events per second, and their processor time.

    python -m benchmarks.http_servers [--store DIR]

Servers that are not installed are left out (`pip install httptools hypercorn granian` brings them). The demo model
computes nothing worth mentioning for an answer of one token, so that what is left is HTTP.
"""

import argparse
import functools
import importlib.util
import json
import os
import selectors
import socket
import sys
import time

import psutil

from benchmarks.servers import running
from edge_phi3.api.exchange import Exchanges
from edge_phi3.api.logs import configure_logging
from edge_phi3.api.server import create_service
from edge_phi3.commands.loading import load_pipeline
from edge_phi3.settings import Settings

CLIENTS = 16
TURNS = 5
"""The best of these is shown: others on the machine only take away."""

TARGET = "benchmarks.http_servers:app"
COMMANDS = {
    "uvicorn, h11, with our bounds": ["edge_phi3", "serve", "demo", "--port", "{port}", "--log-level", "error"],
    "uvicorn, h11": ["uvicorn", TARGET, "--factory", "--http", "h11", "--port", "{port}", "--log-level", "error"],
    "uvicorn, httptools": [
        "uvicorn",
        TARGET,
        "--factory",
        "--http",
        "httptools",
        "--port",
        "{port}",
        "--log-level",
        "error",
    ],
    "hypercorn": ["hypercorn", f"{TARGET}()", "-k", "uvloop", "-b", "127.0.0.1:{port}"],
    "granian": [
        "granian",
        TARGET,
        "--factory",
        "--interface",
        "asgi",
        "--loop",
        "uvloop",
        "--port",
        "{port}",
        "--no-ws",
    ],
}


def app() -> Exchanges:
    """Return the service with the demo model, for the servers that are told where to find it."""
    settings = Settings.load()
    configure_logging(settings.log_format, settings.log_level)
    return create_service(settings, functools.partial(load_pipeline, settings))[0]


def request(path: str, body: dict[str, object] | None) -> bytes:
    """Return a request as clients send it."""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: benchmark\r\nAccept: */*\r\n"
    content = json.dumps(body).encode() if body else b""
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n" if body else ""
    return f"{head}\r\n".encode() + content


CHAT = {"prompt": "a", "return_full_text": False, "generate_kwargs": {"max_new_tokens": 1}}
LONG = {"prompt": "a", "stream": True, "generate_kwargs": {"max_new_tokens": 50, "eos_token_id": -1}}
KINDS = {
    "GET /livez, requests": (request("/livez", None), b"}", 2000),
    "POST /chat, requests": (request("/chat", CHAT), b"}", 400),
    "streamed events": (request("/chat", LONG), b"0\r\n\r\n", 32),
}


def load(port: int, sent: bytes, end: bytes, count: int) -> int:
    """Ask `count` times over `CLIENTS` connections; return how many answers, or events of streams, have come."""
    left, found = count - CLIENTS, 0
    with selectors.DefaultSelector() as selector:
        for _ in range(CLIENTS):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(sent)
            selector.register(client, selectors.EVENT_READ, bytearray())
        while selector.get_map():
            for key, _ in selector.select():
                asked = key.fileobj
                assert isinstance(asked, socket.socket)
                key.data.extend(asked.recv(1 << 18))
                if key.data.endswith(end):
                    assert key.data.startswith(b"HTTP/1.1 200 "), bytes(key.data)
                    found += max(1, key.data.count(b"data: "))
                    key.data.clear()
                    if left > 0:
                        left -= 1
                        asked.sendall(sent)
                    else:
                        selector.unregister(asked)
                        asked.close()
    return found


def seconds_of(port: int) -> float:
    """Return the processor time of what listens on a port, and of its children."""
    listening = [item for item in psutil.net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    (owner,) = {item.pid for item in listening if item.laddr[1:2] == (port,)}
    times = [process.cpu_times() for process in (psutil.Process(owner), *psutil.Process(owner).children())]
    return sum(time.user + time.system for time in times)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="the model store")
    arguments = parser.parse_args()
    options = {"EDGE_PHI3_THREADS": "1", "EDGE_PHI3_STREAM_INTERVAL": "0", "EDGE_PHI3_LOG_LEVEL": "error"}
    environment = {**os.environ, **options} | ({"EDGE_PHI3_STORE": arguments.store} if arguments.store else {})
    print("| server | what | per second | processor time of each, µs |\n| --- | --- | --- | --- |")
    for name, command in COMMANDS.items():
        if importlib.util.find_spec(command[0]) is None:
            continue
        with running([sys.executable, "-m", *command], "/readyz", environment) as url:
            port = int(url.rpartition(":")[2])
            for kind, (sent, end, count) in KINDS.items():
                load(port, sent, end, CLIENTS * 2)
                rates, costs = [], []
                for _ in range(TURNS):
                    before, started = seconds_of(port), time.perf_counter()
                    found = load(port, sent, end, count)
                    rates.append(found / (time.perf_counter() - started))
                    costs.append((seconds_of(port) - before) / found * 1e6)
                print(f"| {name} | {kind} | {max(rates):.0f} | {min(costs):.0f} |", flush=True)


if __name__ == "__main__":
    main()
