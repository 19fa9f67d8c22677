"""Which sequences begin as a new prompt does: a radix tree over token ids.

Running sequences and finished ones both stand in the tree; finished ones stay as cache until their cells are wanted,
the least recently used first (the scheme of SGLang's RadixAttention, with llama.cpp sequences as the values).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class _Node:
    """An edge's tokens, and the node at its end. Every node has a sequence at or below it, except the root."""

    tokens: Tokens
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    owners: set[int] = field(default_factory=set)


class PrefixCache:
    """A radix tree of token sequences, each owned by one sequence id."""

    def __init__(self) -> None:
        self._root = _Node(np.empty(0, np.int32), None)
        self._ends: dict[int, _Node] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        """Count the finished sequences, which are the ones that can be evicted."""
        return len(self._evictable)

    @property
    def evictable(self) -> list[int]:
        """The sequences that only serve as cache, least recently used first."""
        return list(self._evictable)

    def insert(self, seq_id: int, tokens: Tokens, *, evictable: bool) -> None:
        """Enter a sequence, replacing what was known of it.

        Args:
            seq_id: who owns it.
            tokens: token ids whose keys and values the sequence holds, shape ``(tokens,)``.
            evictable: whether it only serves as cache from now on.
        """
        self.remove(seq_id)
        if len(tokens) == 0:
            return
        node, rest = self._root, tokens
        while len(rest):
            child = node.children.get(int(rest[0]))
            if child is None:
                child = _Node(rest.copy(), node)
                node.children[int(rest[0])] = child
                node, rest = child, rest[:0]
                continue
            shared = _common_length(child.tokens, rest)
            if shared < len(child.tokens):
                child = _split(child, shared)
            node, rest = child, rest[shared:]
        node.owners.add(seq_id)
        self._ends[seq_id] = node
        if evictable:
            self._evictable[seq_id] = None

    def remove(self, seq_id: int) -> None:
        """Forget a sequence; nothing happens when it is not known."""
        node = self._ends.pop(seq_id, None)
        if node is None:
            return
        self._evictable.pop(seq_id, None)
        node.owners.discard(seq_id)
        while node.parent is not None and not node.owners and not node.children:
            parent = node.parent
            del parent.children[int(node.tokens[0])]
            node = parent

    def touch(self, seq_id: int) -> None:
        """Mark a cached sequence as used just now."""
        if seq_id in self._evictable:
            self._evictable.move_to_end(seq_id)

    def match(self, tokens: Tokens) -> tuple[int, list[int]]:
        """Find the sequences that share the longest prefix with `tokens`.

        Returns:
            How many tokens are shared, and every sequence that begins with them. ``(0, [])`` when there is none.
        """
        node, length = self._root, 0
        while length < len(tokens):
            child = node.children.get(int(tokens[length]))
            if child is None:
                break
            shared = _common_length(child.tokens, tokens[length:])
            length += shared
            node = child
            if shared < len(child.tokens):
                break
        return (length, _owners_below(node)) if length else (0, [])

    def covered_by(self, tokens: Tokens) -> list[int]:
        """List the cached sequences whose tokens are all a prefix of `tokens`: a longer one makes them useless."""
        found: list[int] = []
        node, length = self._root, 0
        while length < len(tokens):
            child = node.children.get(int(tokens[length]))
            if child is None or _common_length(child.tokens, tokens[length:]) < len(child.tokens):
                break
            length += len(child.tokens)
            node = child
            found += [owner for owner in node.owners if owner in self._evictable]
        return found

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc] # starting anew is exactly what it means


def _common_length(left: Tokens, right: Tokens) -> int:
    count = min(len(left), len(right))
    differing = np.flatnonzero(left[:count] != right[:count])
    return int(differing[0]) if len(differing) else count


def _split(node: _Node, length: int) -> _Node:
    """Put a node in the middle of an edge, `length` tokens below its upper end, and give it."""
    parent = node.parent
    assert parent is not None
    upper = _Node(node.tokens[:length], parent)
    parent.children[int(upper.tokens[0])] = upper
    node.tokens, node.parent = node.tokens[length:], upper
    upper.children[int(node.tokens[0])] = node
    return upper


def _owners_below(node: _Node) -> list[int]:
    owners: list[int] = []
    stack = [node]
    while stack:
        node = stack.pop()
        owners += node.owners
        stack += node.children.values()
    return owners
