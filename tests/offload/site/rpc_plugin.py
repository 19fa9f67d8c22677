"""ggml's RPC backend, loaded into the ggml of the installed llama-cpp-python. Only the standard library.

As a program it is the device: ``python rpc_plugin.py PLUGIN HOST:PORT THREADS [BYTES]``, with so much memory at most.
"""

import ctypes
import importlib.util
import os
import resource
import sys
from pathlib import Path
from typing import Any

PLUGIN, ENDPOINT = "TEST_RPC_PLUGIN", "TEST_RPC_ENDPOINT"
"""Environment variables: the backend's shared library, and the ``host:port`` of its server."""

_CPU = 0
"""``GGML_BACKEND_DEVICE_TYPE_CPU``."""


class RpcBackend:
    """The backend as a plug-in of ggml; `plugin` is its shared library."""

    def __init__(self, plugin: str) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        assert spec is not None
        assert spec.origin is not None
        # The file that llama_cpp itself opens; a wheel has copies of it under other names, each with its own registry.
        self._ggml = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml.so"))
        load = self._ggml.ggml_backend_load
        load.argtypes, load.restype = [ctypes.c_char_p], ctypes.c_void_p
        quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._ggml.ggml_log_set(quiet, None)
        self._registry = load(os.fsencode(plugin))
        self._ggml.ggml_log_set(None, None)
        if not self._registry:
            raise RuntimeError(f"ggml cannot load {plugin}")

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        find = self._ggml.ggml_backend_reg_get_proc_address
        find.argtypes, find.restype = [ctypes.c_void_p, ctypes.c_char_p], ctypes.c_void_p
        return ctypes.CFUNCTYPE(result, *arguments)(find(self._registry, name.encode()))

    def serve(self, endpoint: str, threads: int) -> None:
        """Compute for clients on the CPU, one after another, until the process is ended."""
        device = self._ggml.ggml_backend_dev_by_type
        device.argtypes, device.restype = [ctypes.c_int], ctypes.c_void_p
        devices = (ctypes.c_void_p * 1)(device(_CPU))
        text, size, pointer = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
        start = self._function("ggml_backend_rpc_start_server", None, text, text, size, size, pointer)
        start(endpoint.encode(), None, threads, 1, ctypes.cast(devices, pointer))

    def register(self, endpoint: str) -> None:
        """Make the server's device one of this process's GPUs."""
        added = self._function("ggml_backend_rpc_add_server", ctypes.c_void_p, ctypes.c_char_p)(endpoint.encode())
        if not added:
            raise RuntimeError(f"the server on {endpoint} has no device")
        register = self._ggml.ggml_backend_register
        register.argtypes, register.restype = [ctypes.c_void_p], None
        register(added)


if __name__ == "__main__":
    plugin, endpoint, threads, *memory = sys.argv[1:]
    backend = RpcBackend(plugin)
    if memory:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + int(memory[0])
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    backend.serve(endpoint, int(threads))
