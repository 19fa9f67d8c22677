"""The device itself: ``python rpc_server.py PLUGIN HOST:PORT THREADS``."""

from __future__ import annotations

import sys

from rpc_plugin import RpcBackend

if __name__ == "__main__":
    plugin, endpoint, threads = sys.argv[1:]
    RpcBackend(plugin).serve(endpoint, int(threads))
