"""Pages of main memory: huge ones for what llama.cpp keeps, and many small ones at once for what is copied out of it.

A step reads all weights once, and with pages of 4 KiB the processor looks up an address for every 64 cache lines: 2 MiB
pages made a step of a 0.65 B model 3 % shorter (two cores of an EPYC). llama.cpp does not ask for them, and by the
default of most distributions a process gets only what it asks for. This asks afterwards, for memory that is in use
already (``MADV_COLLAPSE``, Linux 6.1).

New memory is made page by page while it is first written, which takes most of the time of a copy; the kernel can make
all of its pages in one call (``MADV_POPULATE_WRITE``, Linux 5.14).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import sys
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import psutil
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_MADV_COLLAPSE = 25
_MADV_POPULATE_WRITE = 23
"""From linux/mman.h; `mmap` does not know them."""
_HUGE_PAGE = 2 << 20
_LEAST = 32 << 20
"""Bytes of a mapping that is worth it: what is smaller stays in the caches, or is none of llama.cpp's."""
_LARGE = 4 << 20
"""Bytes of new memory whose pages are made in one call. NumPy would ask for huge pages from here on, and a virtual
machine whose host had to find them first took 2 ms for each megabyte; small pages, all at once, took 0.4 ms."""


def use_huge_pages() -> int:
    """Move the large private mappings of this process to huge pages, as far as the kernel can.

    Takes 0.2 to 2 seconds for each GiB. The content stays what it is, and may be read and written meanwhile.

    Returns:
        Bytes on huge pages; 0 where the system does not know of them.
    """
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    madvise = _madvise()
    started, moved = time.monotonic(), 0
    for start, end in _large_mappings():
        madvise(start, end - start, mmap.MADV_HUGEPAGE)
        # Page by page: one that nobody has written yet is refused, and ends the call.
        moved += sum(madvise(page, _HUGE_PAGE, _MADV_COLLAPSE) == 0 for page in range(start, end, _HUGE_PAGE))
    logger.debug("%d MiB moved to huge pages in %.2f s", moved * _HUGE_PAGE >> 20, time.monotonic() - started)
    return moved * _HUGE_PAGE


def new_memory(size: int) -> NDArray[np.uint8]:
    """Give memory that will be written at once, shape ``(size,)``. Other threads go on while its pages are made."""
    if size < _LARGE or sys.platform != "linux":
        return np.empty(size, np.uint8)
    memory = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    # Not MAP_POPULATE: `mmap` would hold the interpreter lock meanwhile. An older kernel refuses, and makes the pages
    # one by one.
    _madvise()(memory.ctypes.data, size, _MADV_POPULATE_WRITE)
    return memory


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return cast("Callable[[int, int, int], int]", function)


def _large_mappings() -> list[tuple[int, int]]:
    """Give first and last address of each private, writable mapping, cut to whole huge pages."""
    found: list[tuple[int, int]] = []
    for mapping in psutil.Process().memory_maps(grouped=False):
        if mapping.path != "[anon]" or not mapping.perms.startswith("rw-p"):
            continue
        first, last = (int(address, 16) for address in mapping.addr.split("-"))
        start, end = -(-first // _HUGE_PAGE) * _HUGE_PAGE, last // _HUGE_PAGE * _HUGE_PAGE
        if end - start >= _LEAST:
            found.append((start, end))
    return found
