"""Which cells of a context belong to which sequences, what a new sequence begins with, and what one leaves behind.

llama.cpp keeps the keys and values; `KVCache` records every change that the engine makes to them, so that it knows how
many cells are free before it decodes. A cell may belong to many sequences (beams, returned sequences, prompts that
begin alike); it is free when the last one lets go.

A new sequence begins with the cells of another that begins as it does, or with what the host cache has kept, or with
both. Finished sequences are kept: on a device with memory of its own in their cells, until there is no room for them,
least recently used out first. On a CPU they move to the host cache, since there every step looks over all cells up to
the highest in use. Copying stops everybody, so a step copies a little at most.
"""

import heapq
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.host_cache import Block, HostCache, Tokens, common_length
from edge_phi3.engine.sequence import Sequence
from edge_phi3.llama.context import Context

logger = logging.getLogger(__name__)

_GROWTH = 512
_LEAST_FREE = 1 / 8
"""The share of a device's cells below which finished sequences leave them."""
_LEAST_RESTORED = 8
"""Tokens that the host cache must know beyond what can be shared: fewer are computed faster than copied."""


class KVCache:
    """The cells of one context.

    A sequence holds positions ``[start[seq_id], length[seq_id])``; `start` is above 0 once the sliding window, so many
    tokens with the one that looks back, has passed by. Finished sequences stay in their cells while there is room, if
    `retain` says so, and are kept in the `host_cache` when they leave them.
    """

    def __init__(
        self, context: Context, *, window: int | None, host_cache: HostCache | None, retain: bool = False
    ) -> None:
        self.cells = context.cells
        self.sequences = context.sequences
        self.host_cache = host_cache
        self._retain = retain
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
        """What others may share of each sequence."""
        self._kept: OrderedDict[int, int] = OrderedDict()
        """Finished sequences by id, the least recently used first: how many tokens of each are worth a copy."""
        self._keepers = np.zeros(self.cells, np.int32)
        """How many of them hold each cell."""

    @property
    def available(self) -> int:
        """How many cells are free, or would be without finished sequences."""
        return self.free + (int(np.count_nonzero(self._keepers > self._sharers)) if self._kept else 0)

    @property
    def used(self) -> int:
        """How many cells hold a token of a running sequence."""
        return self.cells - self.available

    @property
    def untidy(self) -> bool:
        """Whether finished sequences are to leave their cells."""
        return bool(self._kept) and not (self._retain and self.free >= _LEAST_FREE * self.cells)

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

    def truncate(self, seq_id: int, length: int) -> None:
        """Drop the positions of a sequence from `length` on, if it has any."""
        if length >= self.length[seq_id]:
            return
        self._context.remove(seq_id, length, -1)
        self._let_go(self._held[seq_id][length : self.length[seq_id]])
        self.length[seq_id] = length

    def fork(self, sequence: Sequence) -> Sequence:
        """Return a copy of a sequence that goes its own way, and shares its cells."""
        seq_id = self._fork(sequence.seq_id, sequence.computed)
        return Sequence(seq_id, sequence.computed, sequence.scattered)

    def release(self, seq_id: int) -> None:
        """Free a sequence's id and cells."""
        self._prefixes.pop(seq_id, None)
        self._context.remove(seq_id, -1, -1)
        cells = self._held[seq_id][self.start[seq_id] : self.length[seq_id]]
        if self._kept.pop(seq_id, None) is not None:
            self._keepers[cells] -= 1
        self._let_go(cells)
        self.start[seq_id] = self.length[seq_id] = 0
        self._held[seq_id] = np.empty(0, np.int32)
        heapq.heappush(self._free_ids, seq_id)

    def clear(self, *, zero: bool = False) -> None:
        """Drop everything, and overwrite it if wanted, as after a failure that may have left NaN there."""
        self._context.clear(zero=zero)
        self._reset()

    def _fork(self, source: int, length: int) -> int:
        """Take a sequence id and let it share the positions of `source` below `length` that are still held."""
        if not self._free_ids:
            self._evict(next(iter(self._kept)))
        target = heapq.heappop(self._free_ids)
        self._context.copy(source, target)
        if length < self.length[source]:
            self._context.remove(target, length, -1)
        start = self.start[target] = self.start[source]
        self._held[target] = self._held[source][:length].copy()
        self._sharers[self._held[target][start:]] += 1
        self.length[target] = length
        return target

    def _let_go(self, cells: NDArray[np.int32]) -> None:
        alone = self._sharers[cells] == 0
        self._sharers[cells[~alone]] -= 1
        freed = cells[alone]
        self._free_cells[self.free : self.free + len(freed)] = freed
        self.free += len(freed)

    # -- prefixes

    def begin(self, tokens: Tokens) -> Sequence:
        """Return a new sequence that holds as much of the beginning of `tokens` as is known, which may be all.

        It begins with the cells of another sequence, and begins or goes on with what the host cache holds.
        """
        shared, owner = self._longest_shared(tokens, self._prefixes)
        if owner is not None and owner in self._kept:
            self._kept.move_to_end(owner)
        if not self._free_ids:
            leaving = next(iter(self._kept))
            self._evict(leaving)
            if leaving == owner:
                shared, owner = 0, None
        stored, blocks = self.host_cache.match(tokens, self._window) if self.host_cache else (0, [])
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

    def shared_with_running(self, tokens: Tokens) -> int:
        """Return the length of the longest beginning of `tokens` that the cells of a running sequence hold."""
        running = {seq_id: known for seq_id, known in self._prefixes.items() if seq_id not in self._kept}
        return self._longest_shared(tokens, running)[0]

    def _longest_shared(self, tokens: Tokens, prefixes: Mapping[int, Tokens]) -> tuple[int, int | None]:
        """Return the longest beginning of `tokens` that one of some sequences' cells hold, and that sequence."""
        longest, owner = 0, None
        for seq_id, known in prefixes.items():
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
        most, end = max(block.end for block in blocks), blocks[-1].end
        self.make_room(most - blocks[0].begin)
        start = blocks[0].start  # lower than before, where a sequence that left had what it lacked
        if most - start > self.free:
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
        self.truncate(seq_id, len(tokens))
        sequence.computed = len(tokens)
        self._prefixes[seq_id] = tokens.copy()

    # -- finished sequences

    def finish(self, sequence: Sequence, tokens: Tokens | None, worth: int = 0) -> None:
        """Take a sequence that has ended: others may begin with `tokens`, if any; `worth` of them are worth a copy."""
        seq_id = sequence.seq_id
        keeps = self._retain or (self.host_cache is not None and worth > 0)
        if tokens is None or not keeps or len(tokens) <= self.start[seq_id]:
            self.release(seq_id)
            return
        self.truncate(seq_id, len(tokens))
        for other, copied in list(self._kept.items()):
            known, covered = self._prefixes[other], self.start[seq_id] <= self.start[other] and copied <= worth
            if covered and common_length(known, tokens) == len(known):
                self.release(other)
        self._kept[seq_id] = worth
        self._keepers[self._held[seq_id][self.start[seq_id] : self.length[seq_id]]] += 1
        self._prefixes[seq_id] = tokens.copy()

    def make_room(self, cells: int) -> None:
        """Let finished sequences go, the least recently used first, until so many cells are free or none is left."""
        while self.free < cells and self._kept:
            self._evict(next(iter(self._kept)))

    def tidy(self) -> None:
        """Let finished sequences leave their cells, once a step, as far as what is copied then allows."""
        left: float = 1 if self.host_cache is None else self.host_cache.per_step
        while self.untidy and left > 0:
            seq_id = next(iter(self._kept))
            copied, whole = self._save(seq_id, left)
            left -= copied
            if whole:
                self.release(seq_id)

    def _evict(self, seq_id: int) -> None:
        """Let a finished sequence go. What a device computes again is not worth that all wait for a copy."""
        if not self._retain:
            self._save(seq_id, math.inf)
        self.release(seq_id)

    def _save(self, seq_id: int, most: float) -> tuple[int, bool]:
        """Copy a finished sequence, as far as `most` bytes allow; return how many were, and whether that is all."""
        copied, whole = 0, True

        def read(first: int, end: int) -> NDArray[np.uint8]:
            nonlocal copied
            state = self._context.save(seq_id, first, end)
            copied += len(state)
            return state

        worth, start = self._kept[seq_id], self.start[seq_id]
        if self.host_cache is not None and worth > start:
            try:
                whole = self.host_cache.save(self._prefixes[seq_id][:worth], start, read, lambda: copied < most)
            except MemoryError:
                logger.warning("There is no memory to keep %d tokens for later prompts.", worth)
        return copied, whole
