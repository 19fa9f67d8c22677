"""Drafts out of a text itself: what followed the last time that it went on as it does now (prompt lookup decoding).

Saxena, Prompt Lookup Decoding, https://github.com/apoorvumang/prompt-lookup-decoding; transformers'
``PromptLookupCandidateGenerator`` drafts in the same way.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_CANDIDATES = 16
"""Earlier places that are compared with the end of the text, the newest first."""
_LONGEST = 32
"""Tokens that they are compared by at most."""


class Draft(NamedTuple):
    """Tokens that may follow, and how many before them have occurred together before."""

    tokens: list[int]
    matched: int


class PromptLookup:
    """The places of each pair of tokens in a growing text, chained from the newest to the oldest, as zlib has it."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._newest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []
        """For each place, the one before where the same two tokens end; -1 for none."""

    def draft(self, text: NDArray[np.int32], most: int) -> Draft:
        """Return what followed the longest of the last tokens that have occurred before, the newest such place first.

        Args:
            text: all tokens, shape ``(length,)``; those of the call before come first.
            most: the most tokens to return.
        """
        self._follow(text)
        known = self._text
        length = len(known)
        best, end, place = 1, -1, self._earlier[-1] if known else -1
        for _ in range(_CANDIDATES):
            if place < 0:
                break
            matched = 2
            while matched < min(_LONGEST, place + 1) and known[place - matched] == known[length - 1 - matched]:
                matched += 1
            if matched > best:
                best, end = matched, place
            place = self._earlier[place]
        if end < 0:
            return Draft([], 0)
        tokens = known[end + 1 : end + 1 + most]
        while len(tokens) < most:  # the text repeats itself up to its end
            tokens.append(tokens[len(tokens) - (length - 1 - end)])
        return Draft(tokens, best)

    def _follow(self, text: NDArray[np.int32]) -> None:
        known, newest = self._text, self._newest
        for token in text[len(known) :].tolist():
            place = len(known)
            pair = (known[-1] if known else -1, token)
            known.append(token)
            self._earlier.append(newest.get(pair, -1))
            newest[pair] = place
