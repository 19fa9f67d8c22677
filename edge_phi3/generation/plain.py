"""Requests that choose in plain ways, for many steps whose books are kept at their end.

Most requests decode greedily, or draw from what a few warpers leave, with nothing else switched on. Then what surrounds
a choice costs more than the choice: between two steps of a model all code and data leave the processor's caches. Here a
step is the choice alone. The tokens are those of `edge_phi3.generation.decoding.advance`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from edge_phi3.generation.decoding import Chooser, Decoder
from edge_phi3.generation.logits import Scores
from edge_phi3.generation.processors import MinLength
from edge_phi3.generation.sampling import NO_CHOICE, Sampler, SequenceDecoder, choose_greedily


class PlainRows:
    """One row of logits for each of some plain requests, each with one sequence.

    Args:
        decoders: plain ones, as `of` finds out.

    Attributes:
        steps: for how many steps the choice goes on as it is: until a request reaches its length, or may end.
    """

    def __init__(self, decoders: Sequence[SequenceDecoder]) -> None:
        self._decoders = decoders
        self._ends = [decoder.ends for decoder in decoders]
        self.steps = min(decoder.room for decoder in decoders)
        self._banned = self._find_banned()
        parts: dict[Chooser, list[int]] = {}
        for row, decoder in enumerate(decoders):
            parts.setdefault(decoder.chooser, []).append(row)
        self._parts = [_Part(chooser, rows, [decoders[row] for row in rows]) for chooser, rows in parts.items()]

    @classmethod
    def of(cls, decoders: Sequence[Decoder]) -> Self | None:
        """Give the rows of these requests, or None when one of them is not plain."""
        plain: list[SequenceDecoder] = []
        for decoder in decoders:
            if not isinstance(decoder, SequenceDecoder) or not _is_plain(decoder):
                return None
            plain.append(decoder)
        return cls(plain)

    def choose(self, logits: Scores) -> list[int]:
        """Choose the next token of each row.

        Args:
            logits: shape (rows, vocabulary); may be overwritten.

        Returns:
            The tokens; -1 where a row leaves none to choose.
        """
        for row, token in self._banned:
            logits[row, token] = -np.inf
        if len(self._parts) == 1:
            return self._parts[0].choose(logits)
        chosen = [0] * len(logits)
        for part in self._parts:
            for row, token in zip(part.rows, part.choose(logits[part.rows]), strict=True):
                chosen[row] = token
        return chosen

    def ends(self, tokens: Sequence[int]) -> bool:
        """Say whether a step's tokens end one of the requests."""
        return any(token in ends or token < 0 for token, ends in zip(tokens, self._ends, strict=True))

    def accept(self, steps: Sequence[Sequence[int]]) -> None:
        """Enter the tokens of some steps, of which only the last may end a request, into the requests."""
        for decoder, tokens in zip(self._decoders, zip(*steps, strict=True), strict=True):
            if tokens[-1] < 0:
                decoder.fail(NO_CHOICE)
            else:
                decoder.accept_run(tokens)

    def _find_banned(self) -> list[tuple[int, int]]:
        """Find the end tokens that may not come yet, as rows and tokens."""
        banned: list[tuple[int, int]] = []
        for row, decoder in enumerate(self._decoders):
            for processor in decoder.processors:
                assert isinstance(processor, MinLength)
                missing = processor.least_length - decoder.history.length
                if missing > 0:
                    self.steps = min(self.steps, missing)
                    banned += [(row, token) for token in processor.ends.tolist()]
        return banned


class _Part:
    """The rows that choose in the same way."""

    def __init__(self, chooser: Chooser, rows: list[int], decoders: Sequence[SequenceDecoder]) -> None:
        self.rows = rows
        self._sampler = chooser if isinstance(chooser, Sampler) else None
        self._decoders = decoders
        self._warpings = [decoder.warping for decoder in decoders]

    def choose(self, scores: Scores) -> list[int]:
        if self._sampler is None:
            return [int(row.argmax()) for row in scores]
        return self._sampler.choose(scores, self._warpings, [decoder.uniform() for decoder in self._decoders])


def _is_plain(decoder: SequenceDecoder) -> bool:
    chooser = decoder.chooser
    return (
        decoder.simple
        and not decoder.records_scores
        and (isinstance(chooser, Sampler) or chooser is choose_greedily)
        and all(isinstance(processor, MinLength) for processor in decoder.processors)
    )
