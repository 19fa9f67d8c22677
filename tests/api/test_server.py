"""``edge-phi3 serve`` as a process: starting, stopping, and failing to start."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.api.server import example_command
from tests import paced
from tests.api.conftest import PATIENCE, PROMPT

COMMAND = [sys.executable, "-m", "edge_phi3", "serve"]
FAST = ["--threads", "1", "--ctx-size", "4096", "--kv-cache-type", "f32"]
ENDLESS = {"do_sample": False, "max_new_tokens": 3500, "eos_token_id": -1}
FOR_EVER = ("--grace-period", "3600")


@dataclass
class Process:
    """A running ``edge-phi3 serve`` and what it has written to stderr."""

    popen: subprocess.Popen[str]
    url: str = ""
    written: list[str] = field(default_factory=list)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line on stderr."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for line in list(self.written):
                if found := re.search(pattern, line):
                    return found
            time.sleep(0.01)
        raise AssertionError(f"no line like {pattern!r} in {''.join(self.written)}")

    def stop(self, number: int) -> int:
        """Send a signal, wait for the end, and give the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(PATIENCE)


@contextlib.contextmanager
def serving(
    *arguments: str,
    log_format: str = "json",
    environment: Mapping[str, str] = os.environ,
    fast: Sequence[str] = FAST,
    slow: Path | None = None,
) -> Iterator[Process]:
    """Start the service and wait until it is ready; it decodes slowly as long as the file `slow` exists."""
    program = COMMAND if slow is None else [*paced.command(slow), "serve"]
    command = [*program, *arguments, *fast, "--port", "0", "--log-format", log_format]
    environment = {name: value for name, value in environment.items() if not name.startswith("EDGE_PHI3_")}
    popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    process = Process(popen)
    assert popen.stderr is not None

    def read(stream: Any) -> None:
        process.written.extend(iter(stream.readline, ""))

    reader = threading.Thread(target=read, args=[popen.stderr], daemon=True)
    reader.start()
    try:
        process.wait_for(r'"event":"ready"' if log_format == "json" else r"curl -X POST")
        process.url = process.wait_for(r"(http://[0-9.]+:\d+)")[1]
        yield process
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()
        reader.join()
        popen.stderr.close()


def group_is_gone(process: Process) -> bool:
    """Tell whether no process of the service's session is left."""
    try:
        os.killpg(process.popen.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_stops_at_once_with_exit_code_0(model_path: Path, number: int) -> None:
    with serving(str(model_path), *FOR_EVER) as process:
        with client_of(process) as client:
            assert client.get("/healthz").json() == {"status": "Healthy"}
            assert process.stop(number) == 0
        assert group_is_gone(process)


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A file that makes a service slow until it is removed."""
    file = tmp_path / "slow"
    file.touch()
    return file


@contextlib.contextmanager
def client_of(process: Process) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=process.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


def test_sigterm_ends_a_service_whose_engine_never_comes_back(model_path: Path, slow: Path) -> None:
    with serving(str(model_path), "--grace-period", "2", "--stall-timeout", "0", slow=slow) as process:
        with client_of(process) as client, ThreadPoolExecutor(1) as pool:
            slow.write_text("36000")
            answer = pool.submit(client.post, "/chat", json={"prompt": PROMPT})
            wait_until_running(client)
            assert process.stop(signal.SIGTERM) == 0
            assert answer.result(PATIENCE).status_code in {500, 503}
        assert group_is_gone(process)


def test_a_service_that_stays_stalled_is_not_alive_and_exits_with_1(model_path: Path, slow: Path) -> None:
    with serving(str(model_path), "--stall-timeout", "4", slow=slow) as process, client_of(process) as client:
        slow.write_text("36000")
        answer = client.post("/chat", json={"prompt": PROMPT})
        assert answer.status_code == 500
        assert "completed no step" in answer.json()["detail"]
        with contextlib.suppress(httpx.TransportError):  # it may have gone already
            assert client.get("/livez").status_code == 500
        assert process.popen.wait(PATIENCE) == 1
        process.wait_for("The engine does not come back")


def test_running_requests_finish_while_the_service_is_no_longer_ready(model_path: Path, slow: Path) -> None:
    body = {"prompt": PROMPT, "generate_kwargs": {**ENDLESS, "max_new_tokens": 1000}}
    with (
        serving(str(model_path), *FOR_EVER, slow=slow) as process,
        client_of(process) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.post, "/chat", json=body)
        wait_until_running(client)
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for('"event":"stopping"')
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200
        refused = client.post("/chat", json=body)
        assert (refused.status_code, refused.json()) == (503, {"detail": "The service is stopping."})
        slow.unlink()
        assert answer.result(PATIENCE).status_code == 200
        assert process.popen.wait(PATIENCE) == 0


def test_after_the_grace_period_requests_end_with_a_clear_error(model_path: Path, slow: Path) -> None:
    body = {"prompt": PROMPT, "generate_kwargs": ENDLESS}
    begun = threading.Event()

    def stream(client: httpx.Client) -> str:
        with client.stream("POST", "/chat", json=body | {"stream": True}) as response:
            pieces = response.iter_text()
            first = next(pieces)
            begun.set()
            return first + "".join(pieces)

    with (
        serving(str(model_path), "--grace-period", "0.2", slow=slow) as process,
        client_of(process) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        plain, streamed = pool.submit(client.post, "/chat", json=body), pool.submit(stream, client)
        wait_until_running(client, 2)
        assert begun.wait(PATIENCE)
        assert process.stop(signal.SIGTERM) == 0
        answer = plain.result(PATIENCE)
        assert (answer.status_code, answer.json()) == (503, {"detail": "The service is stopping."})
        assert streamed.result(PATIENCE).endswith('event: error\ndata: {"detail":"The service is stopping."}\n\n')
        assert group_is_gone(process)


def test_a_second_signal_does_not_wait(model_path: Path, slow: Path) -> None:
    with (
        serving(str(model_path), *FOR_EVER, slow=slow) as process,
        client_of(process) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(client.post, "/chat", json={"prompt": PROMPT, "generate_kwargs": ENDLESS})
        wait_until_running(client)
        process.popen.send_signal(signal.SIGINT)
        process.wait_for('"event":"stopping"')
        assert process.stop(signal.SIGINT) == 0


def test_the_start_tells_where_what_and_how(model_path: Path) -> None:
    with serving(str(model_path), log_format="text") as process:
        text = "".join(process.written)
        assert f"on {process.url}" in text
        assert "Serving random-4k" in text
        (command,) = re.findall(r"^ +(curl .*)$", text, flags=re.MULTILINE)
        answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert "Result" in json.loads(answer.stdout)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://0.0.0.0:80", "http://127.0.0.1:80/chat"),
        ("http://[::]:80", "http://[::1]:80/chat"),
        ("http://10.1.2.3:8080", "http://10.1.2.3:8080/chat"),
    ],
)
def test_the_example_command_is_one_that_works_here(url: str, shown: str) -> None:
    assert f" {shown} " in example_command(url)


def failed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``edge-phi3 serve`` that cannot start."""
    return subprocess.run(
        [*COMMAND, "--log-level", "error", *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_a_port_in_use_is_one_sentence(model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = failed(str(model_path), "--port", str(port))
    assert result.returncode == 1
    assert result.stderr == (
        f"edge-phi3: Port {port} on 127.0.0.1 cannot be listened on: Address already in use."
        " Choose another with --port or --host.\n"
    )


def test_an_address_of_another_machine_is_one_sentence(model_path: Path) -> None:
    result = failed(str(model_path), "--port", "0", "--host", "192.0.2.1")
    assert result.returncode == 1
    assert result.stderr.startswith("edge-phi3: Port 0 on 192.0.2.1 cannot be listened on: ")


def test_a_file_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "no-model.gguf"
    path.write_bytes(b"GGUF but not really")
    result = failed(str(path), "--port", "0")
    assert result.returncode == 1
    # llama.cpp has its own say before; the last line is ours.
    assert result.stderr.splitlines()[-1].startswith("edge-phi3: ")
    assert str(path) in result.stderr.splitlines()[-1]


def wait_until_running(client: httpx.Client, count: int = 1) -> None:
    """Wait until the engine decodes so many requests."""
    end = time.monotonic() + PATIENCE
    while f'num_requests_running{{model_name="random-4k"}} {count}.0' not in client.get("/metrics/prometheus").text:
        assert time.monotonic() < end
        time.sleep(0.01)
