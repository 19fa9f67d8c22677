"""Which sequences begin as a new prompt does: a radix tree over token ids.

The scheme of SGLang's RadixAttention. It stands twice: for the sequences that run, whose cells a new prompt can share,
and for the blocks of finished ones, which `PrefixStore` keeps in main memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class _Node:
    """An edge's tokens, and the node at its end. Every node has an owner at or below it, except the root."""

    tokens: Tokens
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    owners: set[int] = field(default_factory=set)


class PrefixTree:
    """A radix tree of token sequences, each owned by one number."""

    def __init__(self) -> None:
        self._root = _Node(np.empty(0, np.int32), None)
        self._ends: dict[int, _Node] = {}

    def insert(self, owner: int, tokens: Tokens) -> None:
        """Enter a sequence, replacing what was known of its owner.

        Args:
            owner: whose it is.
            tokens: token ids, shape ``(tokens,)``.
        """
        self.remove(owner)
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
        node.owners.add(owner)
        self._ends[owner] = node

    def remove(self, owner: int) -> None:
        """Forget a sequence; nothing happens when it is not known."""
        node = self._ends.pop(owner, None)
        if node is None:
            return
        node.owners.discard(owner)
        while node.parent is not None and not node.owners and not node.children:
            parent = node.parent
            del parent.children[int(node.tokens[0])]
            node = parent

    def match(self, tokens: Tokens) -> tuple[int, list[int]]:
        """Find the sequences that share the longest prefix with `tokens`.

        Returns:
            How many tokens are shared, and the owner of every sequence that begins with them. ``(0, [])`` when there
            is none.
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
