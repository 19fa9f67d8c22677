"""The programs that this product is compared with, output for output; a comparison whose peer is missing is skipped.

python -m tests.support.peers                          # builds llama.cpp's programs, once
TORCH_PYTHON=/path/to/python pytest -m parity          # an interpreter with torch, transformers 4.49.0, msgspec
CLIENTS_PYTHON=/path/to/python pytest -m parity        # an interpreter with clients, see test_clients.py
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import peers as support
from tests.support.peers import PeerError, llama_cpp_source, run_peer, torch_python

RECORDING = os.environ.get("PARITY_RECORD") == "1"
"""Whether what the peers made is written into ``tests/golden``, for the tests that run without them."""


class Peers:
    """llama.cpp's programs and its converter; asking for what is missing skips the test."""

    def run(self, name: str, *arguments: str | Path) -> str:
        """Run one of llama.cpp's programs to its end, and return what it wrote to stdout."""
        built = support.find_peers()
        if not (built.folder / name).exists():
            pytest.skip(f"{name} is not built; `python -m tests.support.peers` builds it")
        return built.run(name, *arguments)

    def torch(self) -> Path:
        """Return an interpreter that has torch and transformers."""
        python = torch_python()
        if python is None:
            pytest.skip("torch is missing; name an interpreter that has torch and transformers 4.49.0 in TORCH_PYTHON")
        return python

    def python(self, *arguments: str | Path) -> str:
        """Run the interpreter that has torch, and return what it wrote to stdout."""
        return run_peer([self.torch(), *arguments])

    def converter(self) -> Path:
        """Return the path of llama.cpp's ``convert_hf_to_gguf.py``."""
        try:
            return llama_cpp_source() / "convert_hf_to_gguf.py"
        except (PeerError, OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"llama.cpp's source is missing; `python -m tests.support.peers` fetches it: {error}")


@pytest.fixture(scope="session")
def peers() -> Peers:
    """What this product is compared with."""
    return Peers()
