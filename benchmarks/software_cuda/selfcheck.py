"""What the software device must not allow, tried in a process of its own: ``python selfcheck.py NAME``.

Exit code 0 when it is as it should be; `follow` must crash instead, and `leave` must be aborted.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

_TO_DEVICE, _TO_HOST = 1, 2
_OUT_OF_MEMORY = 2
_SIZE = 4096

runtime = ctypes.CDLL("libcudart.so.13")


def allocated(function: str, size: int) -> ctypes.c_void_p:
    """Give memory of ``cudaMalloc`` or ``cudaMallocHost``."""
    address = ctypes.c_void_p()
    assert getattr(runtime, function)(ctypes.byref(address), ctypes.c_size_t(size)) == 0
    return address


def copy(
    target: ctypes.c_void_p, source: ctypes.c_void_p, kind: int, stream: ctypes.c_void_p, size: int = _SIZE
) -> int:
    """Queue a copy and give its status."""
    status: int = runtime.cudaMemcpyAsync(target, source, ctypes.c_size_t(size), kind, stream)
    return status


def follow() -> None:
    """A device address is no address of the process."""
    address = allocated("cudaMalloc", _SIZE).value
    assert address is not None
    ctypes.string_at(address, 1)


def leave() -> None:
    """A copy may not reach beyond an allocation."""
    copy(
        allocated("cudaMalloc", _SIZE), allocated("cudaMallocHost", 2 * _SIZE), _TO_DEVICE, ctypes.c_void_p(), 2 * _SIZE
    )


def wait() -> None:
    """Nothing is done before somebody waits, and what was sent is what pinned memory holds by then."""
    device, host = allocated("cudaMalloc", _SIZE), allocated("cudaMallocHost", _SIZE)
    back, stream = allocated("cudaMallocHost", _SIZE), ctypes.c_void_p()
    assert runtime.cudaStreamCreateWithFlags(ctypes.byref(stream), 1) == 0
    ctypes.memset(host, 1, _SIZE)
    ctypes.memset(back, 2, _SIZE)
    assert copy(device, host, _TO_DEVICE, stream) == 0
    assert copy(back, device, _TO_HOST, stream) == 0
    ctypes.memset(host, 3, _SIZE)
    assert ctypes.string_at(back, _SIZE) == b"\2" * _SIZE
    assert runtime.cudaStreamSynchronize(stream) == 0
    assert ctypes.string_at(back, _SIZE) == b"\3" * _SIZE


def dirty() -> None:
    """New memory is full of NaN."""
    device, back = allocated("cudaMalloc", _SIZE), allocated("cudaMallocHost", _SIZE)
    stream = ctypes.c_void_p()
    assert copy(back, device, _TO_HOST, stream) == 0
    assert runtime.cudaDeviceSynchronize() == 0
    assert ctypes.string_at(back, _SIZE) == b"\xff" * _SIZE


def full() -> None:
    """There is as much memory as was said."""
    size = int(os.environ["SOFTWARE_CUDA_MEMORY"]) << 20
    address = ctypes.c_void_p()
    assert runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(size + 1)) == _OUT_OF_MEMORY
    allocated("cudaMalloc", size)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    assert (free.value, total.value) == (0, size)


CHECKS: dict[str, Callable[[], None]] = {each.__name__: each for each in (follow, leave, wait, dirty, full)}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
