"""Memory that is moved to huge pages stays what it is, and new memory is there at once."""

from __future__ import annotations

import mmap
import platform
import re
from pathlib import Path

import numpy as np
import psutil

from edge_phi3.engine.runtime.pages import new_memory, use_huge_pages


def _on_huge_pages() -> int:
    (size,) = re.findall(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text("ascii"))
    return int(size) << 10


def test_large_memory_is_moved_and_stays_what_it_is() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint32)
    half = memory[: len(memory) // 2]
    half[:] = np.arange(len(half), dtype=np.uint32)
    moved = use_huge_pages()
    assert _on_huge_pages() >= moved
    if _kernel() >= (6, 1):
        assert moved >= 28 << 20
    assert np.array_equal(half, np.arange(len(half), dtype=np.uint32))
    assert not memory[len(half) :].any()


def test_memory_that_nobody_has_written_is_not_taken() -> None:
    memory = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = psutil.Process().memory_info().rss
    use_huge_pages()
    assert psutil.Process().memory_info().rss - before < 64 << 20
    memory.close()


def test_new_memory_has_its_pages_already() -> None:
    before = psutil.Process().memory_info().rss
    memory = new_memory(64 << 20)
    if _kernel() >= (5, 14):
        assert psutil.Process().memory_info().rss - before > 60 << 20
    assert memory.shape == (64 << 20,)
    memory[:] = 7
    assert np.all(memory == 7)
    assert new_memory(5).shape == (5,)


def _kernel() -> tuple[int, int]:
    major, minor, *_ = platform.release().split(".")
    return int(major), int(minor)
