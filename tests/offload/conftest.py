"""A device with memory of its own, where there is no GPU: ggml's RPC backend, computing in a process beside the test.

For llama.cpp such a device is a GPU: layers are offloaded to it, its buffers are not the process's memory, and what is
in them is read and written through ggml's own functions alone. The installed llama-cpp-python comes without the
backend, so it is compiled, in seconds, from the source package of the same version.
"""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.offload.site.rpc_plugin import ENDPOINT, PLUGIN
from tests.support.peers import CACHE, llama_cpp_source, wheel_libraries
from tests.support.services import free_port, wait_for

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
THREADS = 1

_FLAGS = "-std=c++17 -O2 -fPIC -DNDEBUG -DGGML_SHARED -DGGML_BACKEND_DL -DGGML_BACKEND_SHARED -DGGML_BACKEND_BUILD"


@dataclass(frozen=True, slots=True)
class Device:
    """A running device, which serves one process at a time: its backend's library, its address, its log of calls."""

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


@pytest.fixture(scope="session")
def plugin() -> Path:
    """The backend's shared library, compiled the first time and kept with its source in the cache."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.fail("The tests with a device need a C++ compiler, as llama-cpp-python does: apt-get install g++")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "ggml-rpc.lock"):
        libraries = wheel_libraries()
        known = hashlib.sha256((libraries / "libggml-base.so").read_bytes())
        known.update(f"{compiler} {_FLAGS}".encode())
        output = CACHE / f"libggml-rpc-{version('llama-cpp-python')}-{known.hexdigest()[:12]}.so"
        if not output.exists():
            ggml, unfinished = llama_cpp_source(CACHE) / "ggml", output.with_suffix(".unfinished.so")
            backend = ggml / "src" / "ggml-rpc"
            folders = [f"-I{folder}" for folder in (ggml / "include", ggml / "src", backend)]
            linked = [f"-L{libraries}", "-lggml-base", f"-Wl,-rpath,{libraries}", "-pthread"]
            sources = [backend / name for name in ("ggml-rpc.cpp", "transport.cpp")]
            compile_: list[str | Path] = [compiler, "-shared", *_FLAGS.split(), *folders, *sources]
            subprocess.run([*compile_, "-o", unfinished, *linked], check=True)
            unfinished.rename(output)
    return output


@contextlib.contextmanager
def running_device(plugin: Path, log: Path, *, memory: int | None = None) -> Iterator[Device]:
    """Start a device that logs and lets about `memory` bytes be allocated, though it claims to have the machine's."""
    port = free_port()
    endpoint = f"127.0.0.1:{port}"
    command: list[str | Path] = [sys.executable, SITE / "rpc_plugin.py", plugin, endpoint, str(THREADS)]
    command += [] if memory is None else [str(memory)]

    def listens() -> bool:
        assert server.poll() is None, f"the device has ended:\n{log.read_text()}"
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    with (
        log.open("w") as written,
        subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, env=os.environ | {"GGML_RPC_DEBUG": "1"}
        ) as server,
    ):
        try:
            assert wait_for(listens), f"the device does not listen:\n{log.read_text()}"
            yield Device(plugin, endpoint, log)
            assert server.poll() is None, f"the device has ended:\n{log.read_text()}"
        finally:
            server.kill()


@pytest.fixture
def device(plugin: Path, tmp_path: Path) -> Iterator[Device]:
    with running_device(plugin, tmp_path / "device.log") as running:
        yield running


@pytest.fixture(scope="session")
def demo_f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO_CHECKPOINT, tmp_path_factory.mktemp("demo") / "demo-f16.gguf", outtype="f16").path
