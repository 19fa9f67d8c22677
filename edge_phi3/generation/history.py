"""The tokens of a request's running sequences, kept where logits processors can read them without copying."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GROWTH = 128


class TokenHistory:
    """Token ids of the rows of one request: the prompt, then what was generated. All rows are equally long.

    The rows lie in one array that grows in blocks, so that a step costs one assignment, and reordering
    (beams, ended rows) one gather.

    Attributes:
        length: tokens of each row.
        rows: how many rows there are.
        last: the newest token of each row.
    """

    def __init__(self, prompt: NDArray[np.int32], rows: int = 1) -> None:
        """Start with rows that all hold the prompt.

        Args:
            prompt: token ids, shape (n,).
            rows: how many.
        """
        self.length = len(prompt)
        self.rows = rows
        self.last: list[int] = [int(prompt[-1])] * rows
        self._buffer = np.empty((rows, self.length + _GROWTH), dtype=np.int32)
        self._buffer[:, : self.length] = prompt

    @property
    def tokens(self) -> NDArray[np.int32]:
        """A view of all rows, shape (rows, length). It is valid until the next change."""
        return self._buffer[: self.rows, : self.length]

    def extend(self, parents: NDArray[np.intp], tokens: NDArray[np.int32]) -> None:
        """Make new rows: row i continues what was row ``parents[i]`` with ``tokens[i]``.

        Args:
            parents: shape (n,), rows before the call.
            tokens: shape (n,).
        """
        rows = len(parents)
        # Advanced indexing copies before the assignment, so the rows may overlap.
        reordered = self._buffer[parents, : self.length]
        if rows > len(self._buffer):
            self._buffer = np.empty((rows, self._buffer.shape[1]), dtype=np.int32)
        self._buffer[:rows, : self.length] = reordered
        self.rows = rows
        self.append(tokens.tolist())

    def append(self, tokens: list[int]) -> None:
        """Continue each row in place.

        Args:
            tokens: one for each row.
        """
        capacity = self._buffer.shape[1]
        if self.length == capacity:
            grown = np.empty((len(self._buffer), capacity + max(_GROWTH, capacity)), dtype=np.int32)
            grown[: self.rows, :capacity] = self.tokens
            self._buffer = grown
        if self.rows == 1:
            self._buffer[0, self.length] = tokens[0]
        else:
            self._buffer[: self.rows, self.length] = tokens
        self.length += 1
        self.last = tokens

    def keep(self, rows: NDArray[np.intp]) -> None:
        """Let go of all rows but the given ones."""
        self._buffer[: len(rows), : self.length] = self._buffer[rows, : self.length]
        self.rows = len(rows)
        self.last = [self.last[row] for row in rows.tolist()]
