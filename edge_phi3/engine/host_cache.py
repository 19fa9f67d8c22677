"""Keys and values of finished sequences, kept in main memory for prompts that begin as they did.

There, every decode step looks over all cells up to the highest one in use, row by row: on a CPU a cache full of
finished sequences makes a step up to a sixth slower, and a GPU kernel that reads masked cells reads them all.

A sequence is kept in blocks, so that a prefix that many share is kept once, and what is written after an answer grows
with the new tokens, not with the length of the conversation. Blocks form a tree, which branches wherever sequences
part, inside a block too; the least recently used leaf leaves first when the memory is full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
State = NDArray[np.uint8]
BLOCK_SIZE = 256
PER_STEP = 16 << 20
_NOTHING: State = np.empty(0, np.uint8)


def common_length(left: Tokens, right: Tokens) -> int:
    """Return how many tokens two sequences share from their beginnings on."""
    count = min(len(left), len(right))
    differing = left[:count] != right[:count]
    return int(differing.argmax()) if differing.any() else count


@dataclass(slots=True, eq=False)
class Block:
    """The keys and values of some positions of a sequence.

    Attributes:
        parent: the block of the positions before, which may hold some more than those; None for the first.
        tokens: its tokens, shape ``(tokens,)``, from the position `begin` on.
        start: the first position that is held: above `begin` when a sliding window had passed by.
        state: what llama.cpp wrote for ``[start, end)``, shape ``(bytes,)``; empty when nothing is held.
    """

    parent: Block | None
    tokens: Tokens
    begin: int
    start: int
    state: State
    children: list[Block] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The position after its last."""
        return self.begin + len(self.tokens)


class HostCache:
    """Blocks of finished sequences, whose states take `used` of at most `capacity` bytes of main memory.

    A block has `block_size` tokens: what is copied anew at most when a sequence goes on where another ended. `per_step`
    bytes, and a block more at most, are to be copied in one step of the engine, which waits meanwhile. `tokens` counts
    those whose keys and values are held.
    """

    def __init__(self, capacity: int, block_size: int = BLOCK_SIZE, per_step: int = PER_STEP) -> None:
        self.capacity = capacity
        self.per_step = per_step
        self.used = 0
        self.tokens = 0
        self._block_size = block_size
        self._first: list[Block] = []
        self._blocks: OrderedDict[Block, None] = OrderedDict()
        """All blocks, the least recently used first."""

    def match(self, tokens: Tokens, window: int | None = None) -> tuple[int, list[Block]]:
        """Return the length of the longest prefix of `tokens` whose keys and values are held, and its blocks in order.

        The last block may hold more than the prefix, and the first may begin late, where the window allows it (see
        `KVCache`). ``(0, [])`` when there is none.
        """
        best, found, whole = 0, list[Block](), list[Block]()
        for matched, chain in self._chains(tokens):
            if matched <= best:
                continue
            reach = 0 if window is None else max(0, matched - window + 1)
            first = next(at for at in reversed(range(len(chain))) if at == 0 or chain[at].start <= reach)
            if chain[first].start <= reach and all(block.start <= block.begin for block in chain[first + 1 :]):
                best, found, whole = matched, chain[first:], chain
        self._touch(whole)
        return best, found

    def save(
        self, tokens: Tokens, start: int, read: Callable[[int, int], State], go_on: Callable[[], bool] = lambda: True
    ) -> bool:
        """Keep a sequence, or as much of it as may be copied now; return whether another call would keep no more.

        `tokens` are those whose keys and values it holds, from the position `start` on. `read` returns the state of the
        positions ``[first, end)`` that are not kept yet, and `go_on` whether another block may be read.
        """

        def lacks(block: Block) -> bool:
            return block.start > max(block.begin, start)

        def fitting(reached: int, blocks: list[Block]) -> tuple[int, list[Block]]:
            ends = [*(block.begin for block in blocks[1:]), reached]
            for at, (block, end) in enumerate(zip(blocks, ends, strict=True)):
                if lacks(block) and end < block.end:  # the sequences part inside it: it is kept twice
                    return block.begin, blocks[:at]
            return reached, blocks

        found = (fitting(*known) for known in self._chains(tokens))
        matched, chain = max(found, key=lambda known: known[0], default=(0, []))
        self._touch(chain)
        for block in filter(lacks, chain):
            if not go_on():
                return False
            if not self._fill(block, max(block.begin, start), read) or chain[-1] not in self._blocks:
                return True
        if matched == len(tokens):
            return True
        parent, begin = self._going_on(chain, matched, start)
        for first in range(begin, len(tokens), self._block_size):
            if not go_on():
                return False
            end = min(first + self._block_size, len(tokens))
            held = min(max(first, start), end)
            state = read(held, end) if held < end else _NOTHING
            if not self._make_room(len(state), parent):
                return True
            parent = Block(parent, tokens[first:end].copy(), first, held, state)
            self._add(parent)
        return True

    def _going_on(self, chain: list[Block], matched: int, start: int) -> tuple[Block | None, int]:
        """Return after which block, and from which position, a sequence that shares `matched` tokens is kept."""
        if not chain:
            return None, 0
        last = chain[-1]
        if last.end == matched and not last.children and len(last.tokens) < self._block_size and start <= last.start:
            self._drop(last)  # a longer one takes its place
            return last.parent, last.begin
        if matched - last.begin >= last.end - matched:
            return last, matched
        # To restore a block of which little is wanted costs more than to keep that twice.
        return last.parent, last.begin

    def _chains(self, tokens: Tokens) -> Iterator[tuple[int, list[Block]]]:
        """Yield each known prefix that goes on in some block: its length, and its blocks from the first."""
        ways = [(0, list[Block](), self._first)]
        while ways:
            matched, chain, followers = ways.pop()
            # One that begins later goes on from another sequence's tokens, even where its own are the same.
            for block in [block for block in followers if block.begin <= matched]:
                reached = block.begin + common_length(block.tokens, tokens[block.begin :])
                if reached > matched:
                    yield reached, [*chain, block]
                    ways.append((reached, [*chain, block], block.children))

    def _fill(self, block: Block, held: int, read: Callable[[int, int], State]) -> bool:
        """Let a block hold what it lacks, from the position `held` on; return whether there was room for it."""
        state = read(held, block.end)
        if not self._make_room(len(state) - len(block.state), block):
            return False
        self.used += len(state) - len(block.state)
        self.tokens += block.start - held
        block.start, block.state = held, state
        return True

    def _touch(self, chain: list[Block]) -> None:
        for block in reversed(chain):
            self._blocks.move_to_end(block)

    def _siblings(self, block: Block) -> list[Block]:
        return self._first if block.parent is None else block.parent.children

    def _add(self, block: Block) -> None:
        self._blocks[block] = None
        self._siblings(block).append(block)
        self.used += len(block.state)
        self.tokens += block.end - block.start

    def _drop(self, block: Block) -> None:
        del self._blocks[block]
        self._siblings(block).remove(block)
        self.used -= len(block.state)
        self.tokens -= block.end - block.start

    def _make_room(self, size: int, keep: Block | None) -> bool:
        """Drop leaves, the least recently used first, but never `keep`, until `size` bytes are free."""
        if size > self.capacity:
            return False
        while self.used + size > self.capacity:
            leaf = next((block for block in self._blocks if not block.children and block is not keep), None)
            if leaf is None:
                return False
            self._drop(leaf)
        return True
