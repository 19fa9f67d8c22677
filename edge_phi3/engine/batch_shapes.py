"""Which sizes of a batch llama.cpp decodes faster than smaller ones, measured when the model is loaded.

Its CPU kernels multiply rows in tiles, and rows beyond the last whole tile one by one: on an AVX-512 machine 16 rows of
Q4_K take a sixth less time than 13, and 8 rows more than two batches of 4. A batch is filled up with tokens that nobody
reads, or cut in two, wherever that was measured to be faster by more than noise.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_TILE = 16
_SIZES = (16, 15, 8, 4, 12, 32, 31, 24, 7, 28, 20, 11, 3, 6, 10, 13, 14)
"""What is measured, the most telling first, as far as time allows."""

_WORTHWHILE = 0.94
"""The share of the time that another shape may take at most to be chosen."""


class BatchShapes:
    """The shapes that are fastest.

    Args:
        seconds: the time of a batch of so many tokens; sizes between are interpolated.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._sizes = np.array(sorted(seconds), np.float64)
        self._seconds = np.array([seconds[size] for size in sorted(seconds)], np.float64)
        self._largest = max(seconds, default=0)

    @functools.cache  # noqa: B019 - there is one of these for each context, as long as the process lives
    def padding(self, count: int) -> int:
        """Say how many tokens more make a batch of `count` faster; 0 for none.

        Beyond the largest size that was measured, every tile is taken to cost what the last one did.
        """
        if self._largest < _TILE or count == 0:
            return 0
        beyond = max(0, -(-(count - self._largest) // _TILE)) * _TILE
        size = count - beyond
        larger = [other for other in range(size + 1, self._largest + 1) if other % 4 == 0]
        best = min(larger, key=self._time, default=size)
        return best - size if self._time(best) < _WORTHWHILE * self._time(size) else 0

    @functools.cache  # noqa: B019 - see above
    def parts(self, count: int) -> tuple[int, ...]:
        """Give the sizes of the batches that `count` rows are decoded in, the larger first: one, or two."""
        if not 2 <= count <= self._largest:
            return (count,)
        halves = (count - count // 2, count // 2)
        whole = self._time(count + self.padding(count))
        return halves if sum(map(self._time, halves)) < _WORTHWHILE * whole else (count,)

    def fillers(self, ids: Sequence[int], free: Sequence[int]) -> list[int]:
        """Say which free sequences, computed along, make a batch faster where each sequence has cells of its own.

        There llama.cpp computes sequences together only where their ids follow each other: one that is missing in
        between makes two batches of one.

        Args:
            ids: the sequences that decode, in order.
            free: the free ones, in order.
        """
        best: list[int] = []
        if len(ids) > self._largest:
            return best
        most = self._largest - len(ids)
        least = _WORTHWHILE * self._time_of(ids)
        between = [seq_id for seq_id in free if ids[0] < seq_id < ids[-1]]
        beyond = [seq_id for seq_id in free if seq_id > ids[-1]] + [seq_id for seq_id in free[::-1] if seq_id < ids[0]]
        for more in (0, self.padding(len(ids) + len(between))):
            chosen = between + beyond[:more]
            if 0 < len(chosen) <= most and (seconds := self._time_of(sorted([*ids, *chosen]))) < least:
                best, least = chosen, seconds
        return best

    def _time_of(self, ids: Sequence[int]) -> float:
        """Give the time of a batch of one token of each of these sequences."""
        ends = [place for place in range(1, len(ids)) if ids[place] != ids[place - 1] + 1]
        return sum(self._time(end - start) for start, end in itertools.pairwise((0, *ends, len(ids))))

    def _time(self, size: int) -> float:
        return float(np.interp(size, self._sizes, self._seconds))


def measure(decode: Callable[[int], object], most: int, *, seconds: float = 1.5, passes: int = 3) -> BatchShapes:
    """Time batches of several sizes, up to `most`, within about so many seconds; the fastest of some passes counts."""
    sizes = [size for size in (1, *_SIZES) if size <= most]
    fastest: dict[int, float] = {}
    end = time.monotonic() + seconds
    for _ in range(passes):
        for size in sizes:
            if time.monotonic() > end:
                return BatchShapes(fastest)
            started = time.perf_counter()
            decode(size)
            fastest[size] = min(time.perf_counter() - started, fastest.get(size, np.inf))
    return BatchShapes(fastest)
