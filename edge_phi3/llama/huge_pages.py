"""Huge pages of main memory for what llama.cpp keeps there.

A step reads all weights once, and with pages of 4 KiB the processor looks up an address for every 64 cache lines. With
pages of 2 MiB a step of a 0.65 B model at Q4_K_M is 10 % shorter at 1 row, 5 % at 4 and 2 % at 16 (two cores of an
EPYC with AVX-512, medians of 22 alternating steps). llama.cpp does not ask for them, and by the default of most
distributions a process gets only what it asks for. This asks afterwards, for memory that is in use already
(``MADV_COLLAPSE``, Linux 6.1).
"""

import ctypes
import logging
import mmap
import time

import psutil

logger = logging.getLogger(__name__)

_COLLAPSE = 25
"""MADV_COLLAPSE of linux/mman.h; `mmap` does not know it."""
_HUGE_PAGE = 2 << 20
_LEAST = 32 << 20
"""Bytes of a mapping that is worth it: what is smaller stays in the caches, or is none of llama.cpp's."""


def use_huge_pages() -> int:
    """Move the large private mappings of this process to huge pages, as far as the kernel can; return the bytes moved.

    Takes about 2.5 seconds for each GiB. The content stays what it is, and may be read and written meanwhile.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    started, moved = time.monotonic(), 0
    for mapping in psutil.Process().memory_maps(grouped=False):
        if mapping.path == "[anon]" and mapping.perms.startswith("rw-p"):
            first, last = (int(address, 16) for address in mapping.addr.split("-"))
            start, end = -(-first // _HUGE_PAGE) * _HUGE_PAGE, last // _HUGE_PAGE * _HUGE_PAGE
            if end - start >= _LEAST:
                madvise(start, end - start, mmap.MADV_HUGEPAGE)
                # Page by page: one that nobody has written yet is refused, and ends the call.
                moved += sum(madvise(page, _HUGE_PAGE, _COLLAPSE) == 0 for page in range(start, end, _HUGE_PAGE))
    logger.debug("%d MiB moved to huge pages in %.2f s", moved * _HUGE_PAGE >> 20, time.monotonic() - started)
    return moved * _HUGE_PAGE
