"""A real server process of the installed command on a free port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

COMMAND = str(Path(sys.executable).with_name("edge-phi3"))


@dataclass
class Server:
    """A running service.

    Attributes:
        url: where it listens.
        process: the process.
        log: the file that its stderr goes to.
        seconds: from the start of the process to ready.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    seconds: float = 0.0

    def stop(self, how: int = signal.SIGTERM) -> tuple[int, float]:
        """Stop it with a signal; give its exit code and how many seconds that took."""
        started = time.monotonic()
        self.process.send_signal(how)
        return self.process.wait(timeout=20), time.monotonic() - started


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, store: Path) -> Iterator[Server]:
    """Start ``edge-phi3 serve`` and wait until it is ready.

    Args:
        folder: where its log goes.
        arguments: further arguments.
        store: the model store.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"serve-{port}.log"
    started = time.monotonic()
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [COMMAND, "serve", *arguments, "--port", str(port)],
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"EDGE_PHI3_STORE": str(store)},
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/readyz").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - started < 120, log.read_text()
            time.sleep(0.02)
        server.seconds = time.monotonic() - started
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one model store for the whole run, so that the demo model is converted once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Server]:
    """Give the demo model, served at its defaults."""
    with serving(tmp_path_factory.mktemp("server"), store=store) as running:
        yield running
