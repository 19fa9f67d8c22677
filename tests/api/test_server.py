"""``edge-phi3 serve`` as a process: starting, stopping, and failing to start."""

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.api.server import example_command
from tests import paced
from tests.api.conftest import PATIENCE, PROMPT
from tests.support.services import COMMAND, Server, serving, wait_for
from tests.test_cli import edge_phi3

FOR_EVER = ("--grace-period", "3600")
STOPPING = {"detail": "The service is stopping."}

Serve = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A file that makes the service slow until it is removed."""
    file = tmp_path / "slow"
    file.touch()
    return file


@pytest.fixture
def serve(model_path: Path, slow: Path, tmp_path: Path) -> Serve:
    """Return what starts a service that decodes slowly, and waits until it is ready."""
    exact = ("--threads", "1", "--ctx-size", "4096", "--kv-cache-type", "f32", "--log-format", "json")
    return functools.partial(serving, tmp_path, str(model_path), *exact, store=tmp_path, command=paced.command(slow))


def question(tokens: int = 3500) -> dict[str, Any]:
    return {"prompt": PROMPT, "generate_kwargs": {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": -1}}


@contextlib.contextmanager
def asked(server: Server, tokens: int = 3500) -> Iterator[Future[httpx.Response]]:
    """Ask for an answer that takes long, and go on when it is being written."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/chat", json=question(tokens), timeout=PATIENCE)
        assert wait_for(lambda: server.metrics()["num_requests_running"])
        yield answer


def logged(server: Server, words: str) -> bool:
    return wait_for(lambda: words in server.log.read_text())


def group_is_gone(server: Server) -> bool:
    """Return whether no process of the service's session is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, 0)
        return False
    return True


def test_sigterm_ends_a_service_whose_engine_never_comes_back(serve: Serve, slow: Path) -> None:
    with serve("--grace-period", "0.2", "--stall-timeout", "0") as server:
        slow.write_text("36000")
        with asked(server) as answer:
            assert server.stop()[0] == 0
            assert answer.result(PATIENCE).status_code in {500, 503}
        assert group_is_gone(server)


def test_a_service_that_stays_stalled_is_not_alive_and_exits_with_1(serve: Serve, slow: Path) -> None:
    with serve("--stall-timeout", "1") as server:
        slow.write_text("36000")
        answer = server.post("/chat", prompt=PROMPT)
        assert answer.status_code == 500
        assert "completed no step" in answer.json()["detail"]
        with contextlib.suppress(httpx.TransportError):  # it may have gone already
            assert server.get("/livez").status_code == 500
        assert server.process.wait(PATIENCE) == 1
        assert logged(server, "The engine does not come back")


def test_running_requests_finish_while_the_service_is_no_longer_ready(serve: Serve, slow: Path) -> None:
    with serve(*FOR_EVER) as server, asked(server, 1000) as answer:
        server.process.send_signal(signal.SIGTERM)
        assert logged(server, '"event":"stopping"')
        assert server.get("/readyz").status_code == 503
        assert server.get("/livez").status_code == 200
        refused = server.post("/chat", prompt=PROMPT)
        assert (refused.status_code, refused.json()) == (503, STOPPING)
        slow.unlink()
        assert answer.result(PATIENCE).status_code == 200
        assert server.process.wait(PATIENCE) == 0


def test_after_the_grace_period_requests_end_with_a_clear_error(serve: Serve) -> None:
    with serve("--grace-period", "0.2") as server, asked(server) as plain:
        body = question() | {"stream": True}
        with httpx.stream("POST", f"{server.url}/chat", json=body, timeout=PATIENCE) as streamed:
            pieces = streamed.iter_text()
            next(pieces)
            server.process.send_signal(signal.SIGTERM)
            assert "".join(pieces).endswith(f"event: error\ndata: {json.dumps(STOPPING, separators=(',', ':'))}\n\n")
        answer = plain.result(PATIENCE)
        assert (answer.status_code, answer.json()) == (503, STOPPING)
        assert server.process.wait(PATIENCE) == 0
        assert group_is_gone(server)


def test_a_second_signal_does_not_wait(serve: Serve) -> None:
    with serve(*FOR_EVER) as server, asked(server) as answer:
        server.process.send_signal(signal.SIGINT)
        assert logged(server, '"event":"stopping"')
        assert server.stop(signal.SIGINT)[0] == 0
        answer.exception(PATIENCE)


def test_the_start_tells_where_what_and_how_and_an_idle_service_stops_at_once(serve: Serve, slow: Path) -> None:
    slow.unlink()
    with serve("--log-format", "text", *FOR_EVER) as server:
        assert logged(server, "curl ")
        text = server.log.read_text()
        assert f"on {server.url}" in text
        assert "Serving random-4k" in text
        (command,) = re.findall(r"^ +(curl .*)$", text, flags=re.MULTILINE)
        answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert "Result" in json.loads(answer.stdout)
        assert server.stop(signal.SIGINT)[0] == 0
        assert group_is_gone(server)


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("[::]", "[::1]"), ("10.1.2.3", "10.1.2.3")])
def test_the_example_command_is_one_that_works_here(host: str, shown: str) -> None:
    assert f" http://{shown}:80/chat " in example_command(f"http://{host}:80")


def test_what_cannot_start_is_one_sentence(model_path: Path, tmp_path: Path) -> None:
    def sentence(*arguments: str) -> str:
        result = edge_phi3("serve", "--log-level", "error", *arguments)
        assert result.returncode == 1
        return result.stderr.removesuffix("\n")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert sentence(str(model_path), "--port", str(port)) == (
            f"edge-phi3: Port {port} on 127.0.0.1 cannot be listened on: Address already in use."
            " Choose another with --port or --host."
        )
    elsewhere = sentence(str(model_path), "--port", "0", "--host", "192.0.2.1")
    assert elsewhere.startswith("edge-phi3: Port 0 on 192.0.2.1 cannot be listened on: ")
    path = tmp_path / "no-model.gguf"
    path.write_bytes(b"GGUF but not really")
    # Where it loads, it may end the process.
    command = [COMMAND, "serve", "--log-level", "error", str(path), "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 1
    # llama.cpp may write other lines.
    assert re.match(rf"edge-phi3: .*{re.escape(str(path))}", result.stderr.splitlines()[-1])
