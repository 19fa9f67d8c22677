"""The installed command as a process: started on a free port, watched, and stopped."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

COMMAND = str(Path(sys.executable).with_name("edge-phi3"))
_TAKEN = ("num_requests_running", "num_requests_waiting", "num_sequences_running", "kv_cache_cells_used")
PATIENCE = 600.0
"""Seconds until what comes in a few on a quiet machine counts as lost."""

_PORTS = range(20_000, 32_000)
"""Below those that the system gives to outgoing connections, any of which could take a port before it is used."""

_HTTP = httpx.Client(verify=False, trust_env=False, timeout=PATIENCE, limits=httpx.Limits(max_keepalive_connections=0))
"""Asks often; `httpx.get` would read the certificates of the machine each time."""

_GAUGE = re.compile(r"^edge_phi3_(\w+?)(?:\{.*\})? ([-+.0-9e]+)$", re.MULTILINE)
_ERROR = re.compile(r'Traceback|ERROR|"level":"(?:error|critical)"')


@dataclass
class Server:
    """A running service, whose stderr goes to the log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self, how: int = signal.SIGTERM, patience: float = PATIENCE) -> tuple[int, float]:
        """Stop it with a signal; return its exit code and how many seconds that took."""
        started = time.monotonic()
        self.process.send_signal(how)
        return self.process.wait(timeout=patience), time.monotonic() - started

    def get(self, path: str, **options: Any) -> httpx.Response:
        return _HTTP.get(f"{self.url}{path}", **options)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return _HTTP.post(f"{self.url}{path}", json=body)

    def metrics(self) -> dict[str, float]:
        """Return its metrics that have one value, by their names without the prefix."""
        text = self.get("/metrics/prometheus").text
        return {name: float(value) for name, value in _GAUGE.findall(text)}

    def is_idle(self) -> bool:
        """Return whether no request runs or waits, and no sequence and no cell of the KV cache is taken."""
        metrics = self.metrics()
        return not any(metrics[name] for name in _TAKEN)

    def troubles(self, patience: float = PATIENCE) -> list[str]:
        """Wait until it is idle, and return what is wrong with it as a service at rest."""
        found = []
        try:
            if not wait_for(self.is_idle, patience):
                metrics = self.metrics()
                found.append("it does not come to rest: " + ", ".join(f"{name} {metrics[name]:g}" for name in _TAKEN))
            for route in ("/healthz", "/livez", "/readyz"):
                response = self.get(route)
                if response.status_code != 200:
                    found.append(f"{route} gives {response.status_code}: {response.text}")
        except httpx.HTTPError as error:
            found.append(f"it does not answer any more: {error!r}")
        return found

    def logged_errors(self) -> list[str]:
        """Return the lines of its log, JSON or not, that report an error."""
        return [line[:4000] for line in self.log.read_text(errors="replace").splitlines() if _ERROR.search(line)]


def wait_for(condition: Callable[[], object], patience: float = PATIENCE) -> bool:
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def free_port() -> int:
    """Return a port on loopback that nobody listens on, for a program that must be told one before it listens."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def serving(
    folder: Path,
    *arguments: str,
    store: Path | None = None,
    command: Sequence[str] = (COMMAND,),
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Server]:
    """Start ``edge-phi3 serve``, or what stands for it, and wait until it is ready; its log goes to `folder`."""
    port = free_port()
    log = folder / f"serve-{port}.log"
    end = time.monotonic() + PATIENCE
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, "serve", *arguments, "--port", str(port)],
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            env={**environment, **({"EDGE_PHI3_STORE": str(store)} if store else {})},
            start_new_session=True,  # so that its children can be told from those of the tests
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if server.get("/readyz").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
