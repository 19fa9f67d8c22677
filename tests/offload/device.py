"""A device with memory of its own, where there is no GPU: ggml's RPC backend, computing in a process beside the test.

For llama.cpp such a device is a GPU: layers are offloaded to it, its buffers are not the process's memory, and what is
in them is read and written through ggml's own functions alone. The installed llama-cpp-python comes without the
backend, so it is compiled, in seconds, from the source package of the same version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

from tests.offload.site.rpc_plugin import ENDPOINT, PLUGIN
from tests.support.peers import CACHE, llama_cpp_source, wheel_libraries
from tests.support.services import free_port

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
THREADS = 1

_SOURCES = ("ggml-rpc.cpp", "transport.cpp")
_FLAGS = (
    *("-std=c++17", "-O2", "-fPIC", "-DNDEBUG", "-DGGML_SHARED"),
    *("-DGGML_BACKEND_DL", "-DGGML_BACKEND_SHARED", "-DGGML_BACKEND_BUILD"),
)


@dataclass(frozen=True, slots=True)
class Device:
    """A running device; it serves one process at a time.

    Attributes:
        plugin: the backend's shared library.
        endpoint: where its server listens.
        log: what its server writes: each call, with its bytes.
    """

    plugin: Path
    endpoint: str
    log: Path

    @property
    def buffer(self) -> str:
        """llama.cpp's name of its buffers."""
        return f"RPC0[{self.endpoint}]"

    def environment(self) -> dict[str, str]:
        """Return the environment in which Python, and what it starts, has the device, and no option of edge-phi3."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EDGE_PHI3_")}
        path = os.pathsep.join(filter(None, [str(SITE), str(ROOT), clean.get("PYTHONPATH")]))
        return clean | {"PYTHONPATH": path, PLUGIN: str(self.plugin), ENDPOINT: self.endpoint, "COLUMNS": "200"}

    def calls(self, name: str) -> Counter[int]:
        """Count the calls of a name so far, ``get_tensor`` for one, by their bytes."""
        pattern = rf"^\[{name}\] .*\bsize: (\d+)"
        return Counter(int(size) for size in re.findall(pattern, self.log.read_text(), re.MULTILINE))

    def run(
        self, *arguments: str | Path, seconds: float = 600.0, given: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with the device, in the repository's folder; `given` is its stdin."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=self.environment() | environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )


def build_plugin(cache: Path = CACHE) -> Path:
    """Return the backend's shared library, compiled the first time and kept with its source in `cache`."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.fail("The tests with a device need a C++ compiler, as llama-cpp-python does: apt-get install g++")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "ggml-rpc.lock"):
        libraries = wheel_libraries()
        known = hashlib.sha256((libraries / "libggml-base.so").read_bytes())
        known.update(" ".join([compiler, *_FLAGS]).encode())
        output = cache / f"libggml-rpc-{version('llama-cpp-python')}-{known.hexdigest()[:12]}.so"
        if not output.exists():
            _compile(compiler, llama_cpp_source(cache) / "ggml", libraries, output)
    return output


def _compile(compiler: str, ggml: Path, libraries: Path, output: Path) -> None:
    backend = ggml / "src" / "ggml-rpc"
    folders = [f"-I{folder}" for folder in (ggml / "include", ggml / "src", backend)]
    linked = [f"-L{libraries}", "-lggml-base", f"-Wl,-rpath,{libraries}", "-pthread"]
    unfinished = output.with_suffix(".unfinished.so")
    sources = [backend / name for name in _SOURCES]
    subprocess.run([compiler, "-shared", *_FLAGS, *folders, *sources, "-o", unfinished, *linked], check=True)
    unfinished.rename(output)


@contextlib.contextmanager
def running_device(plugin: Path, log: Path, *, memory: int | None = None) -> Iterator[Device]:
    """Start a device of its own, whose server writes `log`.

    About `memory` bytes can be allocated on it; it claims to have as many as the machine all the same.
    """
    port = free_port()
    endpoint = f"127.0.0.1:{port}"
    command: list[str | Path] = [sys.executable, SITE / "rpc_plugin.py", plugin, endpoint, str(THREADS)]
    command += [] if memory is None else [str(memory)]
    told = os.environ | {"GGML_RPC_DEBUG": "1"}
    with (
        log.open("w") as written,
        subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=told) as server,
    ):
        try:
            _wait_until_it_listens(server, port, log)
            yield Device(plugin, endpoint, log)
            assert server.poll() is None, f"the device has ended:\n{log.read_text()}"
        finally:
            server.kill()


def _wait_until_it_listens(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise AssertionError(f"the device does not listen:\n{log.read_text()}")
