"""Memory that is moved to huge pages stays what it is."""

import mmap
import re
from pathlib import Path

import numpy as np
import psutil

from edge_phi3.llama.huge_pages import use_huge_pages


def test_large_memory_is_moved_and_stays_what_it_is() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint32)
    half = memory[: len(memory) // 2]
    half[:] = np.arange(len(half), dtype=np.uint32)
    moved = use_huge_pages()
    (found,) = re.findall(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text("ascii"))
    assert int(found) << 10 >= moved
    assert np.array_equal(half, np.arange(len(half), dtype=np.uint32))
    assert not memory[len(half) :].any()


def test_memory_that_nobody_has_written_is_not_taken() -> None:
    memory = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = psutil.Process().memory_info().rss
    use_huge_pages()
    assert psutil.Process().memory_info().rss - before < 64 << 20
    memory.close()
