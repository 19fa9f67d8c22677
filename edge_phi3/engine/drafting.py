"""What the drafts of one request need: the places of its tokens, and how its drafts have fared.

Where a grammar leaves no choice, drafts are what it forces. Elsewhere they come out of the text itself: what followed
the last time that it went on as it does now (prompt lookup decoding). Saxena, Prompt Lookup Decoding,
https://github.com/apoorvumang/prompt-lookup-decoding; transformers' ``PromptLookupCandidateGenerator`` drafts so too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.decoding import Decoder
from edge_phi3.generation.sampling import SequenceDecoder

_CANDIDATES = 16
"""Earlier places that are compared with the end of the text, the newest first."""
_LONGEST = 32
"""Tokens that they are compared by at most."""
_MEMORY = 0.9
"""What is left of the weight of earlier drafts with each new one."""
_FORCED = 1 << 30
"""The match of tokens that a grammar leaves no choice about, other than how to cut their text into tokens."""
EXPECTED = ((_FORCED, 0.6, 0.0), (8, 0.8, 0.8), (4, 0.6, 0.6), (0, 0.3, 0.3))
"""Of drafts behind a match of at least so many tokens, the share that is expected to hold before any was tried, and the
least that is expected in a new request: another text may repeat itself, but how a model cuts a text is its habit."""


class PromptLookup:
    """The places of each pair of tokens in a growing text, chained from the newest to the oldest, as zlib has it."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._newest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []
        """For each place, the one before where the same two tokens end; -1 for none."""

    def draft(self, text: NDArray[np.int32], most: int) -> tuple[list[int], int]:
        """Return what followed the longest of the last tokens that have occurred before, the newest such place first.

        `text` are all tokens, shape ``(length,)``, those of the call before first. Of what followed, `most` tokens are
        returned, and how many before them had occurred together before.
        """
        known, newest = self._text, self._newest
        for token in text[len(known) :].tolist():
            pair = (known[-1] if known else -1, token)
            self._earlier.append(newest.get(pair, -1))
            newest[pair] = len(known)
            known.append(token)
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
            return [], 0
        tokens = known[end + 1 : end + 1 + most]
        while len(tokens) < most:  # the text repeats itself up to its end
            tokens.append(tokens[len(tokens) - (length - 1 - end)])
        return tokens, best


@dataclass(slots=True)
class Drafting:
    """The drafts of one request.

    Attributes:
        drafted: tokens that were drafted, over all its sequences.
        held: those of them that the model chose.
    """

    drafted: int = 0
    held: int = 0
    kind: int = 0
    """Which of `EXPECTED` the last draft was of."""
    _records: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Of each that was tried, the tokens that held and the drafts that broke off, with those expected before."""
    _lookups: dict[int, PromptLookup] = field(default_factory=dict)

    def share(self, expected: Sequence[float]) -> float:
        """Return how likely a token of the last draft is to hold, if those before it do; `expected` before any did."""
        held, broken = self._record(expected)
        return held / (held + broken)

    def _record(self, expected: Sequence[float]) -> tuple[float, float]:
        return self._records.get(self.kind, (expected[self.kind], 1 - expected[self.kind]))

    def draft(self, decoder: Decoder, most: int) -> NDArray[np.int32]:
        """Return what may follow in each row, shape ``(rows, tokens)``: as many tokens as all of them have."""
        assert isinstance(decoder, SequenceDecoder)
        drafts = []
        for row, (sequence, line) in enumerate(zip(decoder.live, decoder.history.tokens, strict=True)):
            lookup = self._lookups.setdefault(sequence, PromptLookup())
            forced = decoder.forced(row, most)
            drafts.append((forced, _FORCED) if forced else lookup.draft(line, max(0, most)))
        matched = min(matched for _, matched in drafts)
        self.kind = next(kind for kind, (least, *_) in enumerate(EXPECTED) if matched >= least)
        length = min(len(tokens) for tokens, _ in drafts)
        return np.array([tokens[:length] for tokens, _ in drafts], np.int32).reshape(len(drafts), length)

    def judge(self, drafted: int, held: int, rows: int, expected: Sequence[float]) -> None:
        """Take note that `held` of `drafted` tokens of each of so many rows were chosen."""
        self.drafted += drafted * rows
        self.held += held * rows
        before, broken = self._record(expected)
        self._records[self.kind] = before * _MEMORY + held, broken * _MEMORY + (held < drafted)
