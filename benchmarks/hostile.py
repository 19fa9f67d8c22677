"""What bodies built to be slow cost the others: `/healthz` beside them, and what follows when their clients leave.

    python -m benchmarks.hostile [--bodies 100]

Serves the demo model, asks `/healthz` all the time while bodies of up to 4 MB are sent one by one, and prints the
99th percentile and the maximum beside each kind, and beside ordinary requests. Then six bodies of 4 MB are dropped at
once: how long 40 KB take beside what is left of them, and SIGTERM after six more.
"""

import argparse
import functools
import http.client
import itertools
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from tests.support.services import Server, serving

SIZE = (4 << 20) - 4096
TEXTS = {
    "emoji": "🦙" * (SIZE // 4),
    "newlines": "\\n" * (SIZE // 2),
    "spaces": " " * SIZE,
    "one letter": "a" * SIZE,
    "special tokens": "<|end|>" * (SIZE // 7),
    "openings": "<" * SIZE,
    "words": "the quick brown fox " * (SIZE // 20),
}
ASK = b'{"prompt": "Hello", "generate_kwargs": {"max_new_tokens": 1, "do_sample": false%s}}'


@functools.cache
def kinds() -> Mapping[str, tuple[str, bytes]]:
    """Return the route and the body of each kind."""
    names = b"".join(b', "unknown_%d": 1' % number for number in range(200_000))
    found = {"ordinary": ("/chat", ASK % b"")} | {
        f"{name}, {path}": (path, b'{"%s": "%s"}' % (field, text.encode()))
        for name, text in TEXTS.items()
        for path, field in (("/tokenize", b"text"), ("/v1/completions", b"prompt"))
    }
    return found | {
        "200,000 parameters": ("/chat", ASK % names),
        "200,000 fields": ("/v1/completions", b'{"prompt": "Hello", "max_tokens": 1%s}' % names),
        "a parameter of 4 MB": ("/chat", ASK % (b', "%s": 1' % (b"x" * SIZE))),
        "duplicate keys": ("/chat", ASK % (b', "top_k": 1' * (SIZE // 12))),
        "20,000 prompts": ("/v1/completions", json.dumps({"prompt": ["a"] * 20_000}).encode()),
        "tokens": ("/detokenize", json.dumps({"tokens": [300] * (SIZE // 5)}).encode()),
        "nested lists": ("/chat", b'{"prompt": "Hello", "x": %s}' % (b"[" * SIZE)),
        "small objects": ("/chat", b'{"prompt": "Hello", "x": [%s{}]}' % (b"{}," * (SIZE // 3 - 20))),
    }


def post(port: int, path: str, body: bytes) -> int:
    """Send a body; return the status of its answer, which is read to its end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def send(port: int, kind: str, times: int) -> int:
    """Send a body of a kind so many times; return the last status."""
    statuses = [post(port, *kinds()[kind]) for _ in range(times)]
    time.sleep(0.1)  # what the service made of the last is freed after its answer
    return statuses[-1]


def watched(pool: ProcessPoolExecutor, port: int, kind: str, times: int) -> tuple[int, float, float]:
    """Let another process send bodies of a kind.

    Return the last status, and the 99th percentile and the maximum of the milliseconds that `/healthz` took meanwhile.
    """
    health = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    took: list[float] = []
    status = pool.submit(send, port, kind, times)
    while not status.done():
        started = time.perf_counter()
        health.request("GET", "/healthz")
        health.getresponse().read()
        took.append(1e3 * (time.perf_counter() - started))
        time.sleep(0.002)
    return status.result(), float(np.percentile(took, 99)), max(took)


def drop(port: int, count: int) -> None:
    """Send so many of the largest texts, and leave 0.8 s later."""
    bodies: Iterator[bytes] = itertools.cycle(b'{"text": "%s"}' % text.encode() for text in TEXTS.values())
    clients = []
    for body in itertools.islice(bodies, count):
        client = socket.create_connection(("127.0.0.1", port))
        head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        clients.append(client)
    time.sleep(0.8)
    for client in clients:
        client.close()


def run(server: Server, bodies: int) -> None:
    """Print the figures."""
    port, found = server.port, kinds()
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        watched(pool, port, "ordinary", 20)
        _, usual, most = watched(pool, port, "ordinary", 2000)
        print(f"ordinary requests: 99th percentile {usual:.1f} ms, maximum {most:.1f} ms")
        for kind in list(found)[1:]:
            status, high, most = watched(pool, port, kind, -(-bodies // (len(found) - 1)))
            print(f"{kind}: {status}; 99th percentile {high:.1f} ms ({high / usual:.1f} times), maximum {most:.1f} ms")
    drop(port, 6)
    started = time.perf_counter()
    post(port, "/tokenize", json.dumps({"text": "the " * 10_000}).encode())
    print(f"40 KB beside six dropped bodies: {time.perf_counter() - started:.2f} s")
    drop(port, 6)
    print("SIGTERM beside six more: exit code {}, {:.1f} s".format(*server.stop()))


def main() -> None:
    """Parse, serve, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=100)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), "demo") as server:
        run(server, parser.parse_args().bodies)


if __name__ == "__main__":
    main()
