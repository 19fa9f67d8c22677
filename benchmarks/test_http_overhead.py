"""What HTTP adds to the engine, on the demo model or on one that ``HTTP_OVERHEAD_MODEL`` names.

    pytest benchmarks/test_http_overhead.py
    HTTP_OVERHEAD_MODEL=phi-3-mini.gguf pytest benchmarks/test_http_overhead.py -k 32

The service runs in a thread of this process, and so does what it is compared with: the pipeline that its handlers call,
and for the probes a server of a few lines that sends the same bytes whatever it is asked. All answers come over one
kept connection, one after another, and turns alternate.
"""

import asyncio
import contextlib
import functools
import http.client
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.pipeline import TextGenerationPipeline
from tests.support.in_process import Running, ready

PROMPT = "<|user|>\nWhat does json.dumps do?<|end|>\n<|assistant|>\n"
ROUNDS = 40
PROBE_ROUNDS = 500


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The whole service on the demo model at Q4_K_M, or on the model that was named."""
    if named := os.environ.get("HTTP_OVERHEAD_MODEL"):
        model = Path(named)
    else:
        folder = tmp_path_factory.mktemp("http")
        source = convert(DEMO_CHECKPOINT, folder / "demo.gguf").path
        model = quantize(source, folder / "demo-Q4_K_M.gguf", type="Q4_K_M").path
    with ready(functools.partial(_load, model)) as it:
        yield it


def _load(path: Path, _say: object) -> TextGenerationPipeline:
    # Without the prefix cache each turn does the same work.
    # One thread: threads that wait for each other would measure how busy the machine is.
    engine = Engine(EngineSettings(path, prefix_cache=False, threads=1))
    engine.load()
    return TextGenerationPipeline(engine)


@contextlib.contextmanager
def constant_server() -> Iterator[int]:
    """Send the same 200 to every request, and nothing else; return the port."""
    body = b'{"status":"Healthy"}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
        writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


def asking(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None) -> bytes:
    """Ask over a kept connection; return the body of the answer."""
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
    except ConnectionError:
        # The server closes what was idle for some seconds, as on a busy machine it can be.
        connection.close()
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
    data = response.read()
    assert response.status == 200, data
    return data


def alternate(
    benchmark: BenchmarkFixture, case: str, ours: Callable[[], object], other: Callable[[], object], rounds: int
) -> None:
    """Time ours with the benchmark and the other beside it; record the median of the differences and of the ratios."""
    mine: list[float] = []
    others: list[float] = []

    def timed(call: Callable[[], object], times: list[float]) -> None:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)

    benchmark.pedantic(lambda: timed(ours, mine), setup=lambda: timed(other, others), rounds=rounds, warmup_rounds=3)
    pairs = list(zip(mine, others, strict=True))[3:]
    benchmark.extra_info |= {
        "case": case,
        "comparison_milliseconds": round(statistics.median(other for _, other in pairs) * 1e3, 3),
        "added_milliseconds": round(statistics.median(mine - other for mine, other in pairs) * 1e3, 3),
        "ratio": round(statistics.median(mine / other for mine, other in pairs), 3),
    }
    print(f"\n{case}: {benchmark.extra_info}")


@pytest.mark.parametrize("tokens", [1, 32])
def test_chat(tokens: int, service: Running, benchmark: BenchmarkFixture) -> None:
    """A greedy answer over HTTP, and by the pipeline itself from an event loop of ours."""
    kwargs = {"do_sample": False, "max_length": None, "max_new_tokens": tokens, "min_new_tokens": tokens}
    body = json.dumps({"prompt": PROMPT, "return_full_text": False, "generate_kwargs": kwargs}).encode()
    pipeline = service.service.pipeline
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    with asyncio.Runner() as runner:

        def direct() -> str:
            prepared = pipeline.prepare(prompt=PROMPT, messages=None, generate_kwargs=kwargs, return_full_text=False)
            return runner.run(pipeline.generate(prepared)).text

        def over_http() -> str:
            return str(json.loads(asking(connection, "POST", "/chat", body))["Result"])

        assert over_http() == direct()
        alternate(benchmark, f"/chat, {tokens} new tokens", over_http, direct, ROUNDS)
    connection.close()


@pytest.mark.parametrize("path", ["/livez", "/healthz"])
def test_probe(path: str, service: Running, benchmark: BenchmarkFixture) -> None:
    """A probe, and the least that a Python server can do."""
    ours = http.client.HTTPConnection("127.0.0.1", service.port)
    with constant_server() as port:
        other = http.client.HTTPConnection("127.0.0.1", port)
        alternate(
            benchmark,
            path,
            lambda: asking(ours, "GET", path),
            lambda: asking(other, "GET", "/"),
            PROBE_ROUNDS,
        )
        other.close()
    ours.close()
