"""The device itself: ``python rpc_server.py PLUGIN HOST:PORT THREADS [BYTES]``, with so much memory at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from rpc_plugin import RpcBackend


def limit_memory(size: int) -> None:
    """Let this process take so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    plugin, endpoint, threads, *memory = sys.argv[1:]
    backend = RpcBackend(plugin)
    if memory:
        limit_memory(int(memory[0]))
    backend.serve(endpoint, int(threads))
