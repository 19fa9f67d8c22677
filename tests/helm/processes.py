"""Containers of the chart as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helm.chart import Object, environment, preparer, server
from tests.support.services import PATIENCE, serving

NOWHERE = "http://127.0.0.1:9"
"""Where nobody listens: the Hub of a site without internet."""


def command_of(container: Object) -> list[str]:
    """Return the command of a container as it is on this machine: the image's programs are those of this Python."""
    command = [*container.get("command", ["edge-phi3"]), *container.get("args", [])]
    if command[0] == "edge-phi3":
        return [sys.executable, "-m", "edge_phi3", *command[1:]]
    return [sys.executable, *command[1:]]


def environment_of(container: Object, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EDGE_PHI3_", "HF_"))}
    return kept | environment(container) | more


def prepare(objects: list[Object], count: int = 1, **env: str) -> tuple[str, list[str]]:
    """Run the init container that makes the model, `count` times at once; return what all printed, and their logs."""
    container = preparer(objects)
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command, environment = command_of(container), environment_of(container, **env)
    processes = [subprocess.Popen(command, env=environment, **options) for _ in range(count)]
    ended = [process.communicate(timeout=PATIENCE) for process in processes]
    assert {process.returncode for process in processes} == {0}, ended
    (printed,) = {printed for printed, _ in ended}
    return printed.strip(), [log for _, log in ended]


@contextlib.contextmanager
def served(objects: list[Object], keys: Path | None = None, **env: str) -> Iterator[str]:
    """Run the container of the service until its startup probe is content; yield its address.

    Args:
        objects: what the chart makes.
        keys: the file of API keys, in place of the Secret's.
        env: more environment.
    """
    container = server(objects)
    arguments = [str(keys) if keys and part.startswith("/etc/edge-phi3/keys/") else part for part in container["args"]]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), *arguments[1:], environment=environment_of(container, **env)) as running,
    ):
        assert running.get(container["startupProbe"]["httpGet"]["path"]).status_code == 200
        yield running.url
        assert running.stop()[0] == 0, running.log.read_text()
