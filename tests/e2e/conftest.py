"""A real server process of the installed command on a free port."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ports import free_port
from tests.support import services

PATIENCE = 600.0
"""Seconds until what comes in a few on a quiet machine counts as lost."""


class Server(services.Server):
    """A running service."""

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Ask for a path."""
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE, **options)

    def stop(self, how: int = signal.SIGTERM, patience: float = PATIENCE) -> tuple[int, float]:
        """Stop it with a signal; give its exit code and how many seconds that took."""
        return super().stop(how, patience)


@contextlib.contextmanager
def serving(
    folder: Path, *arguments: str, store: Path, command: Sequence[str] = (services.COMMAND,)
) -> Iterator[Server]:
    """Start ``edge-phi3 serve`` and wait until it is ready.

    Args:
        folder: where its log goes.
        arguments: further arguments.
        store: the model store.
        command: what stands for ``edge-phi3``.
    """
    port = free_port()
    log = folder / f"serve-{port}.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, "serve", *arguments, "--port", str(port)],
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"EDGE_PHI3_STORE": str(store)},
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    end = time.monotonic() + PATIENCE
    try:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/readyz").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.02)
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
