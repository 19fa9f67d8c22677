"""What the drafts of one request need: the places of its tokens, and how its drafts have fared."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.decoding import Decoder
from edge_phi3.generation.prompt_lookup import PromptLookup
from edge_phi3.generation.sampling import SequenceDecoder

_MEMORY = 0.9
"""What is left of the weight of earlier drafts with each new one."""
_EXPECTED = ((8, 0.8), (4, 0.6), (0, 0.3))
"""Of drafts behind a match of at least so many tokens, the share that is expected to hold, before any was tried."""


@dataclass(slots=True)
class _Record:
    """How drafts of one kind have fared: tokens that held, and drafts that broke off, with those expected before."""

    held: float
    broken: float

    def add(self, drafted: int, held: int) -> None:
        self.held = self.held * _MEMORY + held
        self.broken = self.broken * _MEMORY + (held < drafted)


@dataclass(slots=True)
class Drafting:
    """The drafts of one request.

    Attributes:
        drafted: tokens that were drafted, over all its sequences.
        held: those of them that the model chose.
    """

    drafted: int = 0
    held: int = 0
    _kind: int = 0
    """Which of `_EXPECTED` the last draft was of."""
    _records: list[_Record] = field(default_factory=lambda: [_Record(held, 1 - held) for _, held in _EXPECTED])
    _lookups: dict[int, PromptLookup] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """How likely a token of the last draft is expected to hold, if those before it do."""
        record = self._records[self._kind]
        return record.held / (record.held + record.broken)

    def draft(self, decoder: Decoder, most: int) -> NDArray[np.int32]:
        """Return what may follow in each row, shape ``(rows, tokens)``: as many tokens as all of them have."""
        assert isinstance(decoder, SequenceDecoder)
        drafts = []
        for sequence, line in zip(decoder.live, decoder.history.tokens, strict=True):
            lookup = self._lookups.setdefault(sequence, PromptLookup())
            drafts.append(lookup.draft(line, max(0, most)))
        matched = min(draft.matched for draft in drafts)
        self._kind = next(kind for kind, (least, _) in enumerate(_EXPECTED) if matched >= least)
        length = min(len(draft.tokens) for draft in drafts)
        return np.array([draft.tokens[:length] for draft in drafts], np.int32).reshape(len(drafts), length)

    def judge(self, drafted: int, held: int, rows: int) -> None:
        """Take note that `held` of `drafted` tokens of each of so many rows were chosen."""
        self.drafted += drafted * rows
        self.held += held * rows
        self._records[self._kind].add(drafted, held)
