"""Which cells of a context belong to which sequences, what a new sequence begins with, and what one leaves behind.

llama.cpp keeps the keys and values; `KVCache` records every change that the engine makes to them, so that it knows how
many cells are free before it decodes. A cell may belong to many sequences (beams, returned sequences, prompts that
begin alike); it is free when the last one lets go.

Cells hold running sequences only. A new one begins with the cells of a running sequence that begins as it does, or with
what the host cache has kept of finished ones, or with both.
"""

from __future__ import annotations

import functools
import heapq
import logging

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.contexts import DecodeContext
from edge_phi3.engine.host_cache import Block, HostCache, Tokens, common_length
from edge_phi3.engine.sequence import Sequence

logger = logging.getLogger(__name__)

_GROWTH = 512
_LEAST_RESTORED = 8
"""Tokens that the host cache must know beyond what can be shared: fewer are computed faster than copied."""


class KVCache:
    """The cells of one context.

    A sequence holds positions ``[start[seq_id], length[seq_id])``; `start` is above 0 once the sliding window has
    passed by.

    Args:
        context: where the cells are.
        window: how many tokens attention reaches back, the token itself included; None for all.
        host_cache: where finished sequences are kept; None for nowhere.
    """

    def __init__(self, context: DecodeContext, *, window: int | None, host_cache: HostCache | None) -> None:
        self.cells = context.cells
        self.sequences = context.sequences
        self.host_cache = host_cache
        self._context = context
        self._window = window
        self._reset()

    def _reset(self) -> None:
        self.start = [0] * self.sequences
        self.length = [0] * self.sequences
        self._sharers = np.zeros(self.cells, np.int32)
        """How many sequences hold each cell beside the first."""
        self._free_cells = np.arange(self.cells - 1, -1, -1, dtype=np.int32)
        self.free = self.cells
        self._held = [np.empty(0, np.int32) for _ in range(self.sequences)]
        self._free_ids = list(range(self.sequences))
        self._prefixes: dict[int, Tokens] = {}
        """What others may share of each running sequence."""
        self._finished: list[tuple[int, Tokens | None]] = []

    @property
    def used(self) -> int:
        """How many cells hold at least one sequence's token."""
        return self.cells - self.free

    @property
    def free_sequences(self) -> int:
        """How many sequence ids are free."""
        return len(self._free_ids)

    @property
    def unsettled(self) -> bool:
        """Whether finished sequences still hold cells."""
        return bool(self._finished)

    # -- cells

    def append(self, seq_id: int, count: int) -> None:
        """Add `count` cells to a sequence. There must be as many free."""
        length = self.length[seq_id]
        held = self._hold(seq_id, length + count)
        self.free -= count
        held[length : length + count] = self._free_cells[self.free : self.free + count]
        self.length[seq_id] = length + count

    def append_one(self, seq_ids: list[int]) -> None:
        """Add one cell to each of some sequences. There must be as many free."""
        self.free -= len(seq_ids)
        cells = self._free_cells[self.free : self.free + len(seq_ids)].tolist()
        for seq_id, cell in zip(seq_ids, cells, strict=True):
            length = self.length[seq_id]
            self._hold(seq_id, length + 1)[length] = cell
            self.length[seq_id] = length + 1

    def _hold(self, seq_id: int, length: int) -> NDArray[np.int32]:
        """Return the cells of a sequence, with room for so many."""
        held = self._held[seq_id]
        if len(held) < length:
            grown = np.empty(max(length, 2 * len(held), _GROWTH), np.int32)
            grown[: len(held)] = held
            self._held[seq_id] = held = grown
        return held

    def trim(self, seq_id: int, start: int) -> None:
        """Drop the positions of a sequence below `start`, which it reaches: they have left the sliding window."""
        old = self.start[seq_id]
        if start <= old:
            return
        self._context.remove(seq_id, 0, start)
        self._let_go(self._held[seq_id][old:start])
        self.start[seq_id] = start

    def fork(self, sequence: Sequence) -> Sequence:
        """Return a copy of a sequence that goes its own way, and shares its cells."""
        seq_id = self._fork(sequence.seq_id, sequence.computed)
        return Sequence(seq_id, sequence.computed, sequence.scattered)

    def release(self, seq_id: int) -> None:
        """Free a sequence's id and cells."""
        self._prefixes.pop(seq_id, None)
        self._context.remove(seq_id, -1, -1)
        self._let_go(self._held[seq_id][self.start[seq_id] : self.length[seq_id]])
        self.start[seq_id] = self.length[seq_id] = 0
        self._held[seq_id] = np.empty(0, np.int32)
        heapq.heappush(self._free_ids, seq_id)

    def clear(self, *, zero: bool = False) -> None:
        """Drop everything, and overwrite it if wanted, as after a failure that may have left NaN there."""
        self._context.clear(zero=zero)
        self._reset()

    def _fork(self, source: int, length: int) -> int:
        """Take a sequence id and let it share the positions of `source` below `length` that are still held."""
        target = heapq.heappop(self._free_ids)
        self._context.copy(source, target)
        if length < self.length[source]:
            self._context.remove(target, length, -1)
        start = self.start[target] = self.start[source]
        self._held[target] = self._held[source][:length].copy()
        self._sharers[self._held[target][start:]] += 1
        self.length[target] = length
        return target

    def _truncate(self, seq_id: int, length: int) -> None:
        """Drop the positions of a sequence from `length` on."""
        self._context.remove(seq_id, length, -1)
        self._let_go(self._held[seq_id][length : self.length[seq_id]])
        self.length[seq_id] = length

    def _let_go(self, cells: NDArray[np.int32]) -> None:
        alone = self._sharers[cells] == 0
        self._sharers[cells[~alone]] -= 1
        freed = cells[alone]
        self._free_cells[self.free : self.free + len(freed)] = freed
        self.free += len(freed)

    # -- prefixes

    def begin(self, tokens: Tokens, *, share: bool, restore: bool) -> Sequence:
        """Return a new sequence that holds as much of the beginning of `tokens` as is known.

        Args:
            tokens: token ids, int32, shape ``(tokens,)``; all of them may be held.
            share: whether it may begin with the cells of a running sequence.
            restore: whether it may begin, or go on, with what the host cache holds.
        """
        shared, owner = self.shared_prefix(tokens) if share else (0, None)
        stored, blocks = self.host_cache.match(tokens, self._window) if restore and self.host_cache else (0, [])
        if stored < shared + _LEAST_RESTORED:
            stored = 0
        if stored > shared:
            # What lies in front of one of the blocks can be shared still, unless a sliding window has passed by.
            whole = shared if owner is not None and self.start[owner] == 0 else 0
            ends = [block.begin for block in blocks if block.start == block.begin <= whole]
            shared = max(ends, default=0)
            owner = owner if shared else None
        seq_id = heapq.heappop(self._free_ids) if owner is None else self._fork(owner, shared)
        sequence = Sequence(seq_id, shared)
        if stored > shared:
            self._restore(sequence, tokens[:stored], [block for block in blocks if block.begin >= shared])
        return sequence

    def shared_prefix(self, tokens: Tokens) -> tuple[int, int | None]:
        """Return the longest beginning of `tokens` that a running sequence's cells hold, and that sequence."""
        longest, owner = 0, None
        for seq_id, known in self._prefixes.items():
            matched = common_length(known, tokens)
            reach = 0 if self._window is None else max(0, matched - self._window + 1)
            if matched > longest and self.start[seq_id] <= reach:
                longest, owner = matched, seq_id
        return longest, owner

    def computed(self, sequence: Sequence, tokens: Tokens) -> None:
        """Note that a sequence holds these tokens: others may begin with them from now on."""
        self._prefixes[sequence.seq_id] = tokens.copy()

    def _restore(self, sequence: Sequence, tokens: Tokens, blocks: list[Block]) -> None:
        """Let a sequence go on with blocks of the host cache up to `tokens`; without them if they do not fit."""
        seq_id, computed = sequence.seq_id, sequence.computed
        start, end = blocks[0].start, blocks[-1].end
        if max(block.end for block in blocks) - start > self.free:
            return
        reached = computed
        for block in blocks:
            if reached > block.begin:
                self._context.remove(seq_id, block.begin, -1)  # what another sequence held there
            if not self._context.restore(seq_id, block.state, behind=reached > 0):
                logger.warning("llama.cpp could not restore %d cached tokens: they are computed anew.", end - start)
                self._context.remove(seq_id, computed, -1)
                return
            reached = block.end
        if not computed:
            self.start[seq_id] = self.length[seq_id] = start
            self._held[seq_id] = np.empty(start, np.int32)
        self.append(seq_id, end - self.length[seq_id])
        self._truncate(seq_id, len(tokens))
        sequence.computed = len(tokens)
        self._prefixes[seq_id] = tokens.copy()

    # -- finished sequences

    def finish(self, sequence: Sequence, tokens: Tokens | None) -> None:
        """Take a sequence that has ended; its cells are free after the next `settle`.

        Args:
            sequence: which.
            tokens: what the host cache keeps of it; None for nothing.
        """
        self._finished.append((sequence.seq_id, tokens))

    def settle(self) -> None:
        """Free the cells of finished sequences, keeping their content in the host cache."""
        while self._finished:
            seq_id, tokens = self._finished.pop()
            if self.host_cache is not None and tokens is not None:
                try:
                    self.host_cache.save(tokens, self.start[seq_id], functools.partial(self._context.save, seq_id))
                except MemoryError:
                    logger.warning("There is no memory to keep %d tokens for later prompts.", len(tokens))
            self.release(seq_id)

    def audit(self) -> None:
        """Check that the records are consistent, and that they agree with the positions that the context holds.

        Raises:
            AssertionError: they differ. A bug of ours.
        """
        counted = np.zeros(self.cells, np.int32)
        for seq_id in range(self.sequences):
            start, length = self.start[seq_id], self.length[seq_id]
            np.add.at(counted, self._held[seq_id][start:length], 1)
            held, expected = self._context.position_range(seq_id), (start, length - 1) if length > start else (-1, -1)
            assert held == expected, f"sequence {seq_id}: the context holds {held}, the engine expects {expected}"
        assert np.array_equal(np.maximum(counted - 1, 0), self._sharers), "shared cells are counted wrongly"
        free = self._free_cells[: self.free]
        assert len(np.unique(free)) == len(free), "a cell is free twice"
        assert not counted[free].any(), "a free cell is held"
        assert np.count_nonzero(counted) == self.used, "used cells are counted wrongly"
        assert all(self.length[seq_id] == 0 for seq_id in self._free_ids), "a free sequence holds cells"
