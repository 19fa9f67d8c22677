"""Keys and values of finished sequences, kept in main memory for prompts that begin as they did.

They leave llama.cpp's cache as soon as a sequence has finished. There, every decode step looks over all cells up to the
highest one in use, row by row: on a CPU a cache full of finished sequences makes a step up to a sixth slower, and a GPU
kernel that reads masked cells reads them all.

A sequence is kept in blocks, so that a prefix that many share is kept once, and what is written after an answer grows
with the new tokens, not with the length of the conversation. Blocks form a tree, which branches wherever sequences
part, inside a block too; the least recently used leaf leaves first when the memory is full.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.prefix_tree import PrefixTree, Tokens

State = NDArray[np.uint8]
_NOTHING: State = np.empty(0, np.uint8)


@dataclass(slots=True, eq=False)
class Block:
    """The keys and values of some positions of a sequence.

    Attributes:
        number: its number in the store.
        parent: the block of the positions before, which may hold some more than those; None for the first.
        begin: its first position.
        start: the first position that is held: above `begin` when a sliding window had passed by.
        end: the position after its last.
        state: what llama.cpp wrote for ``[start, end)``, shape ``(bytes,)``; empty when nothing is held.
        children: how many blocks go on from here.
    """

    number: int
    parent: Block | None
    begin: int
    start: int
    end: int
    state: State
    children: int = 0


class HostCache:
    """Blocks of finished sequences.

    Args:
        capacity: bytes of main memory that states may take.
        block_size: tokens of a block: what is copied anew at most when a sequence goes on where another ended.

    Attributes:
        used: bytes that states take.
        tokens: how many tokens' keys and values are held.
    """

    def __init__(self, capacity: int, block_size: int = 256) -> None:
        self.capacity = capacity
        self._block_size = block_size
        self.used = 0
        self.tokens = 0
        self._tree = PrefixTree()
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._numbers = itertools.count()

    def match(self, tokens: Tokens, window: int | None = None) -> tuple[int, list[Block]]:
        """Find the longest prefix of `tokens` whose keys and values are held.

        Args:
            tokens: shape ``(tokens,)``.
            window: how many tokens attention reaches back, the token itself included; None for all.

        Returns:
            Its length, and its blocks in order: the last may hold more than the prefix, and the first may begin late,
            where the window allows it. ``(0, [])`` when there is none.
        """
        matched, chain = self._chain(tokens)
        reach = 0 if window is None else max(0, matched - window + 1)
        blocks: list[Block] = []
        for block in reversed(chain):
            if block.start > max(block.begin, reach):
                return 0, []
            blocks.insert(0, block)
            if block.start <= reach:
                break
        self._touch(chain)
        return matched, blocks

    def save(self, tokens: Tokens, start: int, read: Callable[[int, int], State]) -> None:
        """Keep a sequence.

        Args:
            tokens: the tokens whose keys and values it holds, shape ``(tokens,)``.
            start: its first position that is still held.
            read: gives the state of the positions ``[first, end)``; called for those that are not kept yet.
        """
        matched, chain = self._chain(tokens)
        self._touch(chain)
        if matched == len(tokens):
            return
        parent, begin = self._going_on(chain, matched)
        for first in range(begin, len(tokens), self._block_size):
            end = min(first + self._block_size, len(tokens))
            held = min(max(first, start), end)
            state = read(held, end) if held < end else _NOTHING
            if not self._make_room(len(state), parent):
                return
            parent = Block(next(self._numbers), parent, first, held, end, state)
            self._add(parent, tokens[:end])

    def _going_on(self, chain: list[Block], matched: int) -> tuple[Block | None, int]:
        """Say behind which of a chain's blocks, and from which position, a sequence is kept that shares `matched`."""
        if not chain:
            return None, 0
        last = chain[-1]
        ended_here = last.end == matched and not last.children
        if ended_here and last.end - last.begin < self._block_size:
            self._drop(last)  # a longer one takes its place
            return last.parent, last.begin
        if matched - last.begin >= last.end - matched:
            return last, matched
        # To restore a block of which little is wanted costs more than to keep that twice.
        return last.parent, last.begin

    def _chain(self, tokens: Tokens) -> tuple[int, list[Block]]:
        """Give the length of the longest known prefix, and its blocks from the first."""
        matched, owners = self._tree.match(tokens)
        chain: list[Block] = []
        # The first that reaches as far; what branches off it begins later.
        block = min((self._blocks[owner] for owner in owners), key=lambda block: (block.begin, block.end), default=None)
        while block is not None:
            chain.insert(0, block)
            block = block.parent
        return matched, chain

    def _touch(self, chain: list[Block]) -> None:
        for block in reversed(chain):
            self._blocks.move_to_end(block.number)

    def _add(self, block: Block, tokens: Tokens) -> None:
        self._blocks[block.number] = block
        self._tree.insert(block.number, tokens)
        self.used += len(block.state)
        self.tokens += block.end - block.start
        if block.parent is not None:
            block.parent.children += 1

    def _drop(self, block: Block) -> None:
        del self._blocks[block.number]
        self._tree.remove(block.number)
        self.used -= len(block.state)
        self.tokens -= block.end - block.start
        if block.parent is not None:
            block.parent.children -= 1

    def _make_room(self, size: int, keep: Block | None) -> bool:
        """Drop leaves, the least recently used first, but never `keep`, until `size` bytes are free."""
        if size > self.capacity:
            return False
        while self.used + size > self.capacity:
            leaves = (block for block in self._blocks.values() if not block.children and block is not keep)
            leaf = next(leaves, None)
            if leaf is None:
                return False
            self._drop(leaf)
        return True
