"""Phi-3's sliding window, which llama.cpp does not know: what has left it is removed before a token is decoded.

A token sees the last `size` ones, itself included. Those of a prompt are fed `chunk` at a time beyond the window, and
all of a chunk see what its first one sees. Chunks begin at absolute positions, so that an answer does not depend on how
a prompt was cut into batches.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """How far attention reaches back; a `size` of None is all tokens."""

    size: int | None
    chunk: int = 1

    def cells_needed(self, prompt_length: int, length: int, rows: int) -> int:
        """Return the most cells that a request holds from its prompt on until its rows have so many tokens.

        Rows share what they have in common, which is the prompt at least.
        """
        size = length if self.size is None else self.size
        gone = max(0, length - size)
        shared, own = max(0, prompt_length - gone), min(length - prompt_length, size)
        return max(min(prompt_length, size + self.chunk - 1), shared + rows * max(0, own))

    def next_chunk(self, prompt_length: int, position: int, end: int) -> int:
        """Return how many tokens from `position` on, up to `end`, may be in one batch."""
        if self.size is None:
            return end - position
        if position < self.size:
            return min(end, self.size) - position
        if position >= prompt_length:
            return min(1, end - position)
        left = self.chunk - (position - self.size) % self.chunk
        return min(left, prompt_length - position, end - position)

    def first_visible(self, prompt_length: int, position: int) -> int:
        """Return the first position that the token at `position` sees."""
        if self.size is None:
            return 0
        if self.size <= position < prompt_length:
            position -= (position - self.size) % self.chunk
        return max(0, position - self.size + 1)
