"""A model without weights: what a token's keys and values are, and what its logits are, as hashes.

A token's content stands for its keys and values. It depends on the token, its position, the rotary factors, and the
contents of all that it attends to, so that a wrong, stale, missing, doubled or foreign one changes all that follow.
What a token attends to enters as a sum that needs no order, in which every content counts by its position: sums of
windows are differences of prefix sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_TOKEN, _POSITION, _ROTARY, _COLUMN = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93
_SPREAD = 8.0
"""The distance of the lowest and the highest logit."""
_UNLIKELY = 40.0


def term(content: int, position: int) -> int:
    """Return what one token adds to the sum of what is attended to, modulo 2**64 once summed."""
    return content * (2 * position + 1)


def content(token: int, position: int, attended: int, rotary: int) -> int:
    """Return the content of a token, 64 bits.

    Args:
        token: its id.
        position: its position.
        attended: the sum of the `term`s of the earlier tokens that it attends to.
        rotary: the number of the set of rotary factors.
    """
    mixed = (attended + (token + 1) * _TOKEN + (position + 1) * _POSITION + (rotary + 1) * _ROTARY) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & MASK  # splitmix64, https://prng.di.unimi.it/splitmix64.c
    mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & MASK
    return mixed ^ (mixed >> 31)


@dataclass(frozen=True)
class HashModel:
    """What contents become logits.

    Attributes:
        vocab_size: logits of a row.
        fills: tokens whose row of logits holds nothing but this value, NaN or infinity for instance; they hardly ever
            come of themselves.
    """

    vocab_size: int
    fills: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = np.arange(1, self.vocab_size + 1, dtype=np.uint64) * np.uint64(_COLUMN)
        object.__setattr__(self, "_columns", columns)

    def logits(self, tokens: Sequence[int], contents: Sequence[int], out: NDArray[np.float32]) -> None:
        """Write the logits that follow some tokens.

        Args:
            tokens: their ids.
            contents: their contents.
            out: shape ``(tokens, vocab_size)``.
        """
        columns: NDArray[np.uint64] = self._columns  # type: ignore[attr-defined]
        mixed = np.array(contents, np.uint64)[:, None] + columns
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(_FIRST)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(_SECOND)
        mixed >>= np.uint64(40)
        np.multiply(mixed, np.float32(_SPREAD / (1 << 24)), out=out, casting="unsafe")
        if self.fills:
            out[:, [*self.fills]] = -_UNLIKELY
            for row, token in enumerate(tokens):
                if token in self.fills:
                    out[row] = self.fills[token]
