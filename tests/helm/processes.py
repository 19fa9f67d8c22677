"""Containers of the chart as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.helm.chart import Object, environment, preparer, server
from tests.ports import free_port

PATIENCE = 600.0
"""Seconds until what comes in a few on a quiet machine counts as lost."""

NOWHERE = "http://127.0.0.1:9"
"""Where nobody listens: the Hub of a site without internet."""


def command_of(container: Object) -> list[str]:
    """Return the command of a container as it is on this machine: the image's programs are those of this Python."""
    command = [*container.get("command", ["edge-phi3"]), *container.get("args", [])]
    if command[0] == "edge-phi3":
        return [sys.executable, "-m", "edge_phi3", *command[1:]]
    return [sys.executable, *command[1:]]


def environment_of(container: Object, **more: str) -> dict[str, str]:
    """Return the environment that a container has in its image."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGE_PHI3_", "HF_"))}
    return kept | environment(container) | more


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    """Wait until a URL answers 200, as a startup probe does."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, "the service ended"
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url} did not answer")


def prepare(objects: list[Object], **env: str) -> str:
    """Run the init container that makes the model; give what it printed, the model's path when it was pulled."""
    container = preparer(objects)
    result = subprocess.run(
        command_of(container),
        env=environment_of(container, **env),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def prepare_together(objects: list[Object], **env: str) -> tuple[str, list[str]]:
    """Run the init container twice at once, as two pods do; give what both printed, and what each logged."""
    container = preparer(objects)
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(command_of(container), env=environment_of(container, **env), **options) for _ in range(2)
    ]
    (printed, log), (other, other_log) = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], log + other_log
    assert printed == other, "both name one file"
    return printed.strip(), [log, other_log]


@contextlib.contextmanager
def served(objects: list[Object], keys: Path | None = None, **env: str) -> Iterator[str]:
    """Run the container of the service until its startup probe is content; give its address.

    Args:
        objects: what the chart makes.
        keys: the file of API keys, in place of the Secret's.
        env: more environment.
    """
    container = server(objects)
    port = free_port()
    command = [
        keys.as_posix() if keys and part.startswith("/etc/edge-phi3/keys/") else part for part in command_of(container)
    ]
    command[command.index("--port") + 1] = str(port)
    process = subprocess.Popen(command, env=environment_of(container, **env), stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}{container['startupProbe']['httpGet']['path']}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
    assert process.wait(timeout=PATIENCE) == 0
