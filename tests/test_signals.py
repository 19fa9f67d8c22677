"""Signals to the command: a service that is told to stop has not failed, and other verbs leave nothing unfinished."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_phi3.conversion.convert import convert
from tests.golden.checkpoints import write_checkpoint

WAITING = """
import os, signal, sys, threading
# A shell that runs the tests in its background lets them, and what they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
import edge_phi3.cli as cli

def block(*_, **__):
    os.write(1, b"here\\n")
    threading.Event().wait()

{patch}
sys.argv = ["edge-phi3", *{arguments!r}]
cli.main()
"""
SERVE = ("serve", "--port", "0")


@contextlib.contextmanager
def running(patch: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command, changed, and wait until it says that it is where it should be."""
    command = [sys.executable, "-c", WAITING.format(patch=patch, arguments=arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as popen:
        try:
            assert popen.stdout is not None
            assert popen.stdout.readline() == "here\n"
            yield popen
        finally:
            popen.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "patch",
    [
        "cli.app = block",
        "import edge_phi3.api.server as server; server.create_service = block",
        "import edge_phi3.api.server as server; server._bind = block",
    ],
)
def test_a_service_that_is_told_to_stop_before_it_serves_exits_with_0(patch: str, number: int) -> None:
    with running(patch, *SERVE) as popen:
        popen.send_signal(number)
        assert popen.communicate(timeout=300)[1] == ""
    assert popen.returncode == 0


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2, 0.5, 0.9])  # wherever its start is then, on whatever machine
def test_a_service_that_is_told_to_stop_while_it_starts_exits_with_0(delay: float) -> None:
    with running("os.write(1, b'here\\n')", *SERVE) as popen:
        time.sleep(delay)
        # It may still be one step before the first line of `main`.
        while popen.poll() is None and not _catches(popen.pid, signal.SIGTERM):
            time.sleep(0.005)
        popen.send_signal(signal.SIGTERM)
        popen.communicate(timeout=300)
    assert popen.returncode == 0


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
@pytest.mark.parametrize("verb", ["convert", "quantize", "pull"])
def test_verbs_that_write_leave_no_unfinished_file(tmp_path: Path, verb: str, number: int, code: int) -> None:
    source, output = write_checkpoint(tmp_path / "checkpoint", layers=1), tmp_path / "out"
    if verb == "quantize":
        source = convert(source, tmp_path / "f32.gguf", outtype="f32").path
    options = {
        "convert": ["-o", f"{output}/model.gguf"],
        "quantize": ["-o", f"{output}/model.gguf", "--type", "q8_0"],
        "pull": ["--store", f"{output}", "--quant", "q8_0"],
    }

    def unfinished() -> list[Path]:
        return list(output.rglob(".*.partial"))

    # It stops where the file has been written and is still to be renamed.
    patch = "import edge_phi3.files\nedge_phi3.files._fsync = block"
    with running(patch, verb, str(source), *options[verb]) as popen:
        assert unfinished()
        popen.send_signal(number)
        errors = popen.communicate(timeout=300)[1]
    assert popen.returncode == code, errors
    assert "Traceback" not in errors
    assert unfinished() == []
    assert not list(output.rglob("*.gguf"))
