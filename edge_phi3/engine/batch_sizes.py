"""How many rows llama.cpp's CPU kernels like to decode together, measured when the model is loaded.

They multiply rows in tiles, and rows beyond the last whole tile one by one: on two cores with AVX2, a 0.65 B model at
Q4_K_M takes 104 ms for 8 rows and 42 for 4, and 144 for 15 but 127 for 16. So rows are decoded in two batches, or
beside tokens that nobody reads, wherever that was measured to be faster by more than noise. On a GPU all go together.

From 64 tokens on attention is computed in tiles of 64 (``ggml_fa_tile_config``), each of which looks through the cells
that any of its tokens sees. So rows that decode and prompts take turns: a prompt of 64 tokens beside 15 rows of 100
takes 660 ms, one after the other 563, and no number of rows from 1 on was slower by more than 2 % that way (0.65 B at
Q4_K_M on two cores with AVX-512).
"""

import functools
import time
from collections.abc import Mapping

import numpy as np

from edge_phi3.llama.context import Context

_GROUPS = ((8, 4, 16, 15), (32, 24, 12, 3), (7, 6, 14, 10), (13, 31, 20, 28))
"""What is measured, the most telling first, as far as time allows; the sizes of a group take turns."""
_PASSES = 3
"""Turns of a group, the fastest of which counts: a busy moment of the machine must not pass for a property of it."""
_WORTHWHILE = 0.94
"""The share of the time that another way may take at most to be chosen."""


class BatchSizes:
    """The fastest ways to decode so many rows, from the seconds that some sizes took; the others are interpolated.

    `tile` is the number of tokens whose attention is computed together; rows are padded to at most `most`.
    """

    def __init__(self, seconds: Mapping[int, float], tile: int = 64, most: int = 1 << 20) -> None:
        self.tile = tile
        self.seconds = dict(seconds)
        self._sizes = np.array(sorted(seconds), np.float64)
        self._seconds = np.array([seconds[size] for size in sorted(seconds)], np.float64)
        self._largest = max((size for size in seconds if size <= most), default=0)

    @functools.cache  # noqa: B019 - there is one of these for each context, as long as the process lives
    def padding(self, rows: int) -> int:
        """Return how many tokens more make a batch of so many rows faster; 0 for none."""
        if rows >= self._largest:
            return 0
        best = min(range(rows, self._largest + 1), key=self._time)
        return best - rows if self._time(best) < _WORTHWHILE * self._time(rows) else 0

    @functools.cache  # noqa: B019 - see above
    def first(self, rows: int) -> int:
        """Return how many of so many rows the next batch takes: all, or the larger half."""
        if not 2 <= rows <= self._largest:
            return rows
        halves = (rows - rows // 2, rows // 2)
        apart = sum(self._time(half + self.padding(half)) for half in halves)
        return halves[0] if apart < _WORTHWHILE * self._time(rows + self.padding(rows)) else rows

    def _time(self, rows: int) -> float:
        return float(np.interp(rows, self._sizes, self._seconds))


def measure(context: Context, *, seconds: float = 4.0) -> BatchSizes:
    """Time batches of several sizes, for about so many seconds at most."""
    fastest: dict[int, float] = {}
    end = time.monotonic() + seconds
    for group in _GROUPS:
        for rows in [size for size in group if size <= context.batch_size] * _PASSES:
            if time.monotonic() > end:
                return BatchSizes(fastest, most=context.sequences)
            context.tokens[:rows] = 0
            context.positions[:rows], context.seq_ids[:rows] = np.divmod(np.arange(rows), context.sequences)
            context.wants_logits[:rows] = 1
            started = time.perf_counter()
            context.decode(rows, rows)
            fastest[rows] = min(time.perf_counter() - started, fastest.get(rows, np.inf))
            context.clear()
    return BatchSizes(fastest, most=context.sequences)
