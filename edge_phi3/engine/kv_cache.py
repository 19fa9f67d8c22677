"""Which cells of the KV cache belong to which sequences.

llama.cpp keeps the keys and values; this book-keeping mirrors every change that the engine makes to them, so that the
engine knows how many cells are free before it decodes, and can prove that none has leaked. In a unified cache a cell
may belong to many sequences (beams, returned sequences, cached prompts); it is free when the last one lets go.
"""

from __future__ import annotations

import heapq
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_GROWTH = 512


class Memory(Protocol):
    """The changes that llama.cpp's memory understands: `Context` is one."""

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold all cells of `source`."""

    def remove(self, seq_id: int, start: int, end: int) -> None:
        """Take positions ``[start, end)`` from a sequence; -1 leaves that side open."""

    def clear(self, *, zero: bool = False) -> None:
        """Empty the cache, and overwrite it if wanted."""


class KVCache:
    """Sequences and their cells.

    A sequence holds positions ``[start[seq_id], length[seq_id])``. `start` is above 0 only after `trim`, which the
    sliding
    window needs.

    Args:
        memory: llama.cpp's side.
        cells: cells in all.
        sequences: sequence ids, 0 to ``sequences - 1``.
        cells_per_sequence: how many positions one sequence can hold.
        shared: whether a copied sequence shares its cells (unified cache) or takes new ones.
    """

    def __init__(self, memory: Memory, *, cells: int, sequences: int, cells_per_sequence: int, shared: bool) -> None:
        self._memory = memory
        self.cells = cells
        self.sequences = sequences
        self.cells_per_sequence = cells_per_sequence
        self.shared = shared
        self._reset()

    def _reset(self) -> None:
        self.start = [0] * self.sequences
        self.length = [0] * self.sequences
        self._sharers = np.zeros(self.cells, np.int32)
        """How many sequences hold each cell beside the first."""
        self._free_cells = np.arange(self.cells - 1, -1, -1, dtype=np.int32)
        self._free_count = self.cells
        self._held = [np.empty(0, np.int32) for _ in range(self.sequences)]
        self._free_ids = list(range(self.sequences))

    @property
    def free(self) -> int:
        """How many cells are free."""
        return self._free_count

    @property
    def used(self) -> int:
        """How many cells hold at least one sequence's token."""
        return self.cells - self._free_count

    @property
    def free_sequences(self) -> int:
        """How many sequence ids are free."""
        return len(self._free_ids)

    @property
    def free_ids(self) -> list[int]:
        """The free sequence ids, in order."""
        return sorted(self._free_ids)

    def acquire(self) -> int:
        """Take the lowest free sequence id. There must be one."""
        return heapq.heappop(self._free_ids)

    def append(self, seq_id: int, count: int) -> None:
        """Give a sequence `count` more cells. There must be as many free."""
        length = self.length[seq_id]
        held = self._held[seq_id]
        if len(held) < length + count:
            grown = np.empty(max(length + count, 2 * len(held), _GROWTH), np.int32)
            grown[:length] = held[:length]
            self._held[seq_id] = held = grown
        self._free_count -= count
        if count == 1:
            held[length] = self._free_cells[self._free_count]
        else:
            held[length : length + count] = self._free_cells[self._free_count : self._free_count + count]
        self.length[seq_id] = length + count

    def fork(self, source: int, length: int) -> int:
        """Take a free sequence id and let it begin with the first `length` positions of `source`.

        Positions that `source` has already trimmed stay absent. In a shared cache this costs no cells; otherwise there
        must be as many free as are copied.

        Returns:
            The new sequence id.
        """
        target = self.acquire()
        start = self.start[source]
        self._memory.copy(source, target)
        if length < self.length[source]:
            self._memory.remove(target, length, -1)
        if self.shared:
            self.start[target] = start
            held = self._held[source][:length].copy()
            self._sharers[held[start:]] += 1
            self._held[target] = held
            self.length[target] = length
        else:
            self.adopt(target, start, length)
        return target

    def adopt(self, seq_id: int, start: int, end: int) -> None:
        """Enter the positions ``[start, end)`` that an empty sequence was given. As many cells must be free."""
        self.start[seq_id] = self.length[seq_id] = start
        self._held[seq_id] = np.empty(start, np.int32)
        self.append(seq_id, end - start)

    def truncate(self, seq_id: int, length: int) -> None:
        """Drop the positions of a sequence from `length` on."""
        old = self.length[seq_id]
        if length >= old:
            return
        self._memory.remove(seq_id, length, -1)
        self._let_go(self._held[seq_id][length:old])
        self.length[seq_id] = length

    def trim(self, seq_id: int, start: int) -> None:
        """Drop the positions of a sequence below `start`: they have left the sliding window."""
        old = self.start[seq_id]
        if start <= old:
            return
        self._memory.remove(seq_id, 0, start)
        self._let_go(self._held[seq_id][old:start])
        self.start[seq_id] = start

    def release(self, seq_id: int) -> None:
        """Drop a sequence and free its id."""
        self._memory.remove(seq_id, -1, -1)
        self._let_go(self._held[seq_id][self.start[seq_id] : self.length[seq_id]])
        self.start[seq_id] = self.length[seq_id] = 0
        self._held[seq_id] = np.empty(0, np.int32)
        heapq.heappush(self._free_ids, seq_id)

    def clear(self, *, zero: bool = False) -> None:
        """Drop everything, and overwrite it if wanted."""
        self._memory.clear(zero=zero)
        self._reset()

    def audit(self) -> None:
        """Check the books against themselves.

        Raises:
            AssertionError: a cell is counted wrongly, or a free sequence holds cells. A bug of ours.
        """
        counted = np.zeros(self.cells, np.int32)
        for seq_id in range(self.sequences):
            np.add.at(counted, self._held[seq_id][self.start[seq_id] : self.length[seq_id]], 1)
        assert np.array_equal(np.maximum(counted - 1, 0), self._sharers), "shared cells are counted wrongly"
        free = self._free_cells[: self._free_count]
        assert len(np.unique(free)) == len(free), "a cell is free twice"
        assert not counted[free].any(), "a free cell is held"
        assert np.count_nonzero(counted) == self.used, "used cells are counted wrongly"
        assert all(self.length[seq_id] == 0 for seq_id in self._free_ids), "a free sequence holds cells"

    def _let_go(self, cells: NDArray[np.int32]) -> None:
        alone = self._sharers[cells] == 0
        self._sharers[cells[~alone]] -= 1
        freed = cells[alone]
        self._free_cells[self._free_count : self._free_count + len(freed)] = freed
        self._free_count += len(freed)
