"""Servers that a benchmark starts, waits for, and stops, all with the same means."""

import concurrent.futures
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.peers import Peers

_PATIENCE = 300.0


@contextlib.contextmanager
def ours(model: Path, *, threads: int, parallel: int, ctx_size: int, options: Sequence[str] = ()) -> Iterator[str]:
    """Run ``edge-phi3 serve`` with its defaults otherwise, and yield its URL."""
    command = [sys.executable, "-c", "from edge_phi3.cli import main; main()", "serve", str(model), "--port", "{port}"]
    command += ["--threads", str(threads), "--parallel", str(parallel), "--ctx-size", str(ctx_size)]
    with running([*command, "--log-level", "warning", *options], "/readyz", None) as url:
        yield url


@contextlib.contextmanager
def llama_server(
    peers: Peers, model: Path, *, threads: int, parallel: int, ctx_size: int, options: Sequence[str] = ()
) -> Iterator[str]:
    """Run llama-server with its defaults otherwise, and yield its URL."""
    command = [str(peers.program("llama-server")), "--model", str(model), "--port", "{port}"]
    command += ["--threads", str(threads), "--parallel", str(parallel), "--ctx-size", str(ctx_size)]
    with running([*command, "--log-verbosity", "0", *options], "/health", peers.environment()) as url:
        yield url


@contextlib.contextmanager
def original(python: Path, checkpoint: Path, *, threads: int) -> Iterator[str]:
    """Run the original service's stand-in, by an interpreter that has transformers, and yield its URL."""
    script = Path(__file__).with_name("transformers_service.py")
    command = [str(python), str(script), str(checkpoint), "--port", "{port}", "--threads", str(threads)]
    with running(command, "/", None) as url:
        yield url


def complete(url: str, bodies: Sequence[dict[str, Any]], path: str = "/v1/completions") -> list[dict[str, Any]]:
    """Ask for an answer to each body, all at once, and return the answers; `RuntimeError` with what a refusal says."""

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                answer: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code}: {error.read().decode(errors='replace')}") from None
        return answer

    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(ask, bodies))


@contextlib.contextmanager
def running(command: Sequence[str], ready: str, environment: dict[str, str] | None) -> Iterator[str]:
    """Run a server on a free port, put where its command says ``{port}``, and yield its URL when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [part.replace("{port}", str(port)) for part in command]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _wait_until(url + ready, process)
            yield url
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-3000:])
            raise
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with status {process.returncode} before it was ready.")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as reply:
            if reply.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"The server was not ready within {_PATIENCE:g} s.")
