"""Sequences of one context: what a new one begins with, and what a finished one leaves behind.

Cells hold running sequences only. A new one begins with the cells of a running sequence that begins as it does, or with
what the prefix store has kept of finished ones, or with both.
"""

from __future__ import annotations

import functools
import logging

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.prefix_store import Block, PrefixStore
from edge_phi3.engine.prefix_tree import PrefixTree
from edge_phi3.engine.runtime import Context
from edge_phi3.engine.sequence import RunningRequest, Sequence

logger = logging.getLogger(__name__)

_LEAST_REUSED = 8
"""Tokens that must be known for a prompt to begin with a copy of them: fewer are computed faster than copied, and
leave a number of tokens that llama.cpp's kernels like less (a 0.65 B model takes 177 ms for 64 and 206 for 63)."""

_FEW_RUNS = 32
"""Tokens that lie apart on a GPU and are still copied to main memory one by one."""


class SequencePool:
    """The sequences of one context.

    Args:
        context: where they are decoded.
        window: how many tokens attention reaches back, the token itself included; None for all.
        store: where finished sequences are kept; None for nowhere.

    Attributes:
        kv: which cells belong to which sequence.
    """

    def __init__(self, context: Context, *, window: int | None, store: PrefixStore | None) -> None:
        self.kv = KVCache(
            context,
            cells=context.cells,
            sequences=context.sequences,
            cells_per_sequence=context.cells_per_sequence,
            shared=context.unified,
        )
        self.store = store
        self._context = context
        self._window = window
        self._tree = PrefixTree()
        self._finished: list[tuple[int, NDArray[np.int32]]] = []

    @property
    def held(self) -> int:
        """How many sequence ids running requests hold."""
        return self.kv.sequences - self.kv.free_sequences - len(self._finished)

    @property
    def unsettled(self) -> bool:
        """Whether finished sequences still hold cells."""
        return bool(self._finished)

    def attach(self, sequence: Sequence, *, share: bool, restore: bool) -> None:
        """Give a sequence an id, and let it begin with the longest prefix that is known.

        Args:
            sequence: which.
            share: whether it may begin with the cells of a running sequence.
            restore: whether it may begin, or go on, with what the store holds.
        """
        shared, owner = self.shared_prefix(sequence) if share else (0, None)
        stored, blocks = self._stored_prefix(sequence) if restore else (0, [])
        if stored < shared + _LEAST_REUSED:
            stored = 0
        if stored > shared:
            # What lies in front of the first block that is wanted can be shared still, unless a sliding window has
            # passed by.
            whole = shared if owner is not None and self.kv.start[owner] == 0 else 0
            shared = max((block.begin for block in blocks if block.begin <= whole), default=0)
            owner = owner if shared else None
        if owner is None:
            sequence.seq_id, sequence.computed = self.kv.acquire(), 0
        else:
            sequence.seq_id, sequence.computed = self.kv.fork(owner, shared), shared
        if stored > shared:
            self._restore(sequence, stored, [block for block in blocks if block.begin >= shared])

    def shared_prefix(self, sequence: Sequence) -> tuple[int, int | None]:
        """Give the longest prefix that a running sequence's cells hold, and that sequence."""
        # The last token is always decoded: its logits choose the next one.
        matched, owners = self._tree.match(sequence.tokens[: sequence.length - 1])
        if not self.kv.shared and matched < _LEAST_REUSED:
            return 0, None
        reach = matched if self._window is None else max(0, matched - self._window + 1)
        for owner in owners:
            start = self.kv.start[owner]
            if start == 0 or (self._window is not None and start <= reach):
                return matched, owner
        return 0, None

    def _stored_prefix(self, sequence: Sequence) -> tuple[int, list[Block]]:
        if self.store is None:
            return 0, []
        return self.store.match(sequence.tokens[: sequence.length - 1], self._window)

    def _restore(self, sequence: Sequence, length: int, blocks: list[Block]) -> None:
        """Let a sequence go on with blocks of the store, up to `length` tokens; without them if they do not fit."""
        seq_id, computed = sequence.seq_id, sequence.computed
        start, end = blocks[0].start, blocks[-1].end
        if max(block.end for block in blocks) - start > self.kv.free:
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
        if computed:
            self.kv.append(seq_id, end - computed)
        else:
            self.kv.adopt(seq_id, start, end)
        self.kv.truncate(seq_id, length)
        sequence.computed = length
        self._tree.insert(seq_id, sequence.tokens[:length])

    def computed(self, sequence: Sequence) -> None:
        """Note that a part of a prompt has been decoded: others may begin with it from now on."""
        self._tree.insert(sequence.seq_id, sequence.tokens[: sequence.computed])

    def fork(self, sequence: Sequence) -> Sequence:
        """Give a copy of a sequence that goes its own way."""
        return sequence.fork(self.kv.fork(sequence.seq_id, sequence.computed))

    def release(self, seq_id: int) -> None:
        """Free a sequence's id and cells."""
        self._tree.remove(seq_id)
        self.kv.release(seq_id)

    def finish(self, request: RunningRequest) -> None:
        """Take the sequences of a request that has ended. Their cells are free after the next `settle`."""
        for sequence in request.sequences:
            if sequence.seq_id >= 0:
                self._finished.append((sequence.seq_id, sequence.tokens[: self._worth_keeping(request, sequence)]))
                sequence.seq_id, sequence.computed = -1, 0

    def settle(self) -> None:
        """Free the cells of finished sequences, keeping their content in the prefix store."""
        while self._finished:
            seq_id, tokens = self._finished[-1]
            if self.store is not None:
                start = self.kv.start[seq_id]
                self.store.save(tokens, start, functools.partial(self._context.save, seq_id))
            self.release(seq_id)
            self._finished.pop()

    def forget(self) -> None:
        """Empty the KV cache after a failure. What the store has is as good as before."""
        self._finished.clear()
        self._tree.clear()
        self.kv.clear(zero=True)

    def _worth_keeping(self, request: RunningRequest, sequence: Sequence) -> int:
        """Say how many tokens of a leaving sequence are kept: all, or the prompt's where the rest would cost too much.

        A GPU copies each run of neighbouring cells by itself, layer by layer, and tokens that were decoded beside
        others lie apart.
        """
        costly = self._context.offloaded and self.kv.shared and sequence.scattered > _FEW_RUNS
        return min(sequence.computed, request.prompt_length) if costly else sequence.computed
