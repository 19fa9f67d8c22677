"""Load and faults for hours, on services of five kinds, and a report: what was lost?

    python -m benchmarks.soak --hours 1 [--connections 500] [--output FILE.json]

Each service has a fifth of the time. So many connections send random requests of every kind and size, with schemas,
tools and adapters, good and bad; some leave. Each request bears a marker, and nothing that goes to anybody else, to
the log or to the metrics may hold it. Every tenth is a greedy one whose answer was found alone before, in all of which
the second-best token is far from the best. Memory, descriptors and threads are read at rest. At last the service is
stopped for a while (SIGSTOP), killed (SIGKILL), and ended (SIGTERM) under full load, again and again, and started anew.
The exit code is 1 when anything is not as it should be; what, is in the report.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from edge_phi3.bench.machine import Machine
from tests.support.models import adapter_arguments
from tests.support.service_client import COMPLETIONS
from tests.support.service_requests import AskMaker, words_of
from tests.support.service_setups import Setup, make_model
from tests.support.services import Server, serving, wait_for

_LIMITS = {"request_timeout": 60.0, "max_queue": 256, "max_connections": 1024, "prefix_cache_mib": 16}
SETUPS = {
    "4k": Setup("4k", {**_LIMITS, "parallel": 16}, adapters=2),
    "a cache of 1,024 tokens": Setup("4k", {**_LIMITS, "ctx_size": 1024, "prefix_cache_mib": 1}),
    "a window of 64": Setup("window of 64", _LIMITS),
    "128k": Setup("128k", _LIMITS),
    "q8_0": Setup("phi-4-mini", {**_LIMITS, "kv_cache_type": "q8_0"}, adapters=1),
}
_PARTS, _WARM, _POOL = 7, 3, (os.cpu_count() or 1) + 4
"""Parts of a service's time, with a rest after each; those that warm it up; threads that asyncio starts when needed."""
_KNOWN, _MARGIN = 40, 0.02
"""Greedy requests whose answers are known, and the least difference of the log-probabilities of its two best tokens."""
_MARKER = re.compile(rb"mk[0-9a-f]{12}")
_EXPECTED = {200, 400, 404, 413, 429, 504}
_STOPPING = {0, 503}
"""What requests come to only when the service is being ended."""


class Report(msgspec.Struct):
    """What came of one service.

    Attributes:
        seconds: how long it was under load.
        statuses: requests by what they came to; "left" when the client did.
        equal: greedy answers that were what they are alone.
        faults: how many of each kind, and the longest time until it was ready again, in seconds.
        memory: bytes resident at rest after each part without faults; descriptors and threads likewise.
        wrong: what is not as it should be.
    """

    service: str
    seconds: float = 0.0
    statuses: Counter[str] = msgspec.field(default_factory=Counter)
    equal: int = 0
    faults: dict[str, tuple[int, float]] = {}
    memory: list[int] = []
    descriptors: list[int] = []
    threads: list[int] = []
    wrong: list[str] = []


class Record(msgspec.Struct):
    """What one run found, and where."""

    machine: Machine
    connections: int
    reports: list[Report]


class Soak:
    """One service under load."""

    def __init__(self, name: str, folder: Path, connections: int) -> None:
        self.report = Report(name)
        self._setup, self._folder, self._connections = SETUPS[name], folder, connections
        self._model = make_model(folder, self._setup.kind, 1)
        self._chance = random.Random(name)
        self._server: Server | None = None
        self._known: list[tuple[dict[str, Any], str]] = []
        self._running = asyncio.Event()
        self._done = self._ending = False

    @contextlib.contextmanager
    def _serving(self, *, ended: bool = False) -> Iterator[Server]:
        """Serve; of what ends before only the log can be searched."""
        adapters = adapter_arguments(self._model, self._setup.adapters)
        environment = os.environ | self._setup.environment()
        with serving(self._folder, str(self._model), *adapters, store=self._folder, environment=environment) as server:
            self._server = server
            yield server
            metrics = b"" if ended else server.get("/metrics/prometheus").content
        self._search(server.log.read_bytes() + metrics, b"", "log or metrics")

    async def run(self, seconds: float) -> Report:
        """Load the service for so long."""
        part = seconds / _PARTS
        with self._serving() as server:
            await self._learn()
            async with self._clients():
                for _ in range(_PARTS - 1):
                    await self._load(part)
                    await self._measure(server)
        await self._fail(part)
        for name, factor, more in (("memory", 1.02, 0), ("descriptors", 1, 0), ("threads", 1, _POOL)):
            numbers: list[int] = getattr(self.report, name)
            if numbers[-1] > max(numbers[:_WARM]) * factor + more:
                self.report.wrong.append(f"{name} grew: {numbers}")
        return self.report

    async def _learn(self) -> None:
        """Ask for greedy answers, one at a time, and keep those that rounding cannot change."""
        words = words_of(self._setup.kind)
        for number in range(_KNOWN):
            body = {"prompt": " ".join(self._chance.choices(words, k=self._chance.randint(5, 60))), "max_tokens": 24}
            body |= {"temperature": 0, "logprobs": 2, "ignore_eos": True}
            if adapter := number % (self._setup.adapters + 1):
                body["model"] = str(adapter)
            _, raw = await self._exchange(COMPLETIONS, json.dumps(body).encode())
            choice = json.loads(raw.partition(b"\r\n\r\n")[2])["choices"][0]
            tops = [sorted(each.values())[-2:] for each in choice["logprobs"]["top_logprobs"]]
            if all(len(top) == 2 and top[1] - top[0] > _MARGIN for top in tops):
                self._known.append((body, choice["text"]))

    @contextlib.asynccontextmanager
    async def _clients(self) -> AsyncIterator[None]:
        self._done = False
        self._running.clear()
        async with asyncio.TaskGroup() as group:
            for number in range(self._connections):
                group.create_task(self._client(random.Random(f"{self.report.service} {number}")))
            await asyncio.sleep(0)  # all make their first requests, for which a connection would wait too long
            try:
                yield
            finally:
                self._done = True
                self._running.set()

    async def _load(self, seconds: float) -> None:
        self._running.set()
        await asyncio.sleep(seconds)
        self._running.clear()
        self.report.seconds += seconds

    async def _client(self, chance: random.Random) -> None:
        maker = AskMaker(chance.randrange(2**31), self._setup, longest=600)
        while True:
            for ask, *_ in maker.chains(1, crosstalk=0):
                await self._running.wait()
                if self._done:
                    return
                if self._known and chance.random() < 0.1:
                    body, text = chance.choice(self._known)
                    await self._ask(COMPLETIONS, body, None, text)
                else:
                    await self._ask(ask.path, ask.body, ask.leaves)

    async def _ask(self, path: str, body: Any, leaves: float | None, text: str | None = None) -> None:
        marker = f"mk{self._chance.getrandbits(48):012x}"
        if isinstance(body, dict):
            body = body | {"user": marker}
            if text is None and isinstance(body.get("prompt"), str):
                body["prompt"] = f"{marker} {body['prompt']}"
            body = json.dumps(body).encode()
        ending = self._ending
        try:
            status, raw = await self._exchange(path, body, leaves)
        except OSError as error:  # a body that is too large is refused before all of it was sent
            status, raw = (413 if len(body) > self._setup.settings.max_body_size else 0), repr(error).encode()
        self.report.statuses[{-1: "left", 0: "cut by a fault"}.get(status, str(status))] += 1
        self._search(raw, marker.encode(), "an answer")
        if status >= 0 and status not in _EXPECTED and not (status in _STOPPING and (ending or self._ending)):
            self.report.wrong.append(f"{path}: {status} {raw[-300:]!r}")
        if status == 0:
            await asyncio.sleep(0.1)
        if text is not None and status == 200:
            answer = json.loads(raw.partition(b"\r\n\r\n")[2])["choices"][0]["text"]
            self.report.equal += answer == text
            if answer != text and self._setup.options.get("kv_cache_type") != "q8_0":
                self.report.wrong.append(f"{answer!r} instead of {text!r}")

    async def _exchange(self, path: str, body: bytes, leaves: float | None = None) -> tuple[int, bytes]:
        """Send a request on a connection of its own; return the status, -1 after leaving, 0 when cut, and all bytes."""
        assert self._server is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        try:
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if leaves is not None:
                await asyncio.sleep(leaves)
                return -1, b""
            raw = await reader.read()
        finally:
            writer.close()
        headers, _, content = raw.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", headers)
        whole = len(content) == int(length[1]) if length else content.endswith(b"0\r\n\r\n")
        return int(headers[9:12]) if whole else 0, raw

    def _search(self, text: bytes, own: bytes, where: str) -> None:
        if strangers := set(_MARKER.findall(text)) - {own}:
            self.report.wrong.append(f"{where} holds the markers of others: {sorted(strangers)[:3]}")

    async def _measure(self, server: Server) -> None:
        process = psutil.Process(server.process.pid)
        if not await asyncio.to_thread(wait_for, server.is_idle, 120):
            self.report.wrong.append("it does not come to rest")
        await asyncio.to_thread(wait_for, lambda: len(process.net_connections()) < 2, 60)
        await asyncio.sleep(2)  # after a second at rest memory is given back
        self.report.memory.append(process.memory_info().rss)
        self.report.descriptors.append(process.num_fds())
        self.report.threads.append(process.num_threads())
        if errors := server.logged_errors():
            self.report.wrong += errors[:3]

    async def _fail(self, seconds: float) -> None:
        """Do harm under full load, again and again."""
        end = time.monotonic() + seconds
        kinds = [signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL]
        while time.monotonic() < end:
            for kind in kinds:
                started = time.monotonic()
                with self._serving(ended=kind != signal.SIGSTOP) as server:
                    ready = time.monotonic() - started
                    self._ending = False
                    async with self._clients():
                        await self._load(min(10.0, seconds / 4))
                        self._running.set()
                        self._ending = kind != signal.SIGSTOP
                        server.process.send_signal(kind)
                        await asyncio.sleep(3)
                        if kind == signal.SIGSTOP:
                            server.process.send_signal(signal.SIGCONT)
                            await self._load(1)
                        else:
                            code = await asyncio.to_thread(server.process.wait, 120)
                            if code != (0 if kind == signal.SIGTERM else -kind):
                                self.report.wrong.append(f"{kind.name} ends it with {code}")
                count, longest = self.report.faults.get(kind.name, (0, 0.0))
                self.report.faults[kind.name] = count + 1, max(longest, ready)


def shown(report: Report) -> str:
    """Return a report as one line for people."""
    growth = report.memory[-1] / max(report.memory[:_WARM]) - 1
    requests = ", ".join(f"{count} x {status}" for status, count in sorted(report.statuses.items()))
    faults = ", ".join(
        f"{count} x {name} (ready after {longest:.1f} s)" for name, (count, longest) in report.faults.items()
    )
    total = sum(report.statuses.values())
    return (
        f"{report.service}: {report.seconds:.0f} s, {total} requests ({requests}), {report.equal} answers equal;"
        f" {faults}; memory {growth:+.1%}; descriptors {report.descriptors[-1]}, threads {report.threads[-1]};"
        f" wrong: {len(report.wrong)}"
    )


def main() -> int:
    """Run, and print a line for each service."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--only", choices=SETUPS, action="append", help="such a service alone; repeatable")
    parser.add_argument("--output", type=Path, help="write the report to this file")
    arguments = parser.parse_args()
    names, reports = arguments.only or list(SETUPS), []
    with tempfile.TemporaryDirectory() as work:
        for number, name in enumerate(names):
            folder = Path(work) / str(number)
            folder.mkdir()
            soak = Soak(name, folder, arguments.connections)
            report = asyncio.run(soak.run(arguments.hours * 3600 / len(names)))
            reports.append(report)
            print(shown(report), *report.wrong[:10], sep="\n  ", flush=True)
    if arguments.output:
        record = Record(Machine.here(), arguments.connections, reports)
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    return int(any(report.wrong for report in reports))


if __name__ == "__main__":
    sys.exit(main())
