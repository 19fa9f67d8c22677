"""The finished beams of one group: which are kept, and when no better ones can come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.decoding import FinishReason, TokenScore

Path = tuple["Path", TokenScore] | None
"""How the tokens of a beam scored: a linked list, newest first, that beams share."""


@dataclass(slots=True)
class Hypothesis:
    """One finished beam.

    Attributes:
        score: sum of log-probabilities over a power of the generated length.
        tokens: token ids, prompt included, without the end token; shape (n,).
        reason: why it ended.
        path: how its generated tokens scored, the end token included; None unless recorded.
    """

    score: float
    tokens: NDArray[np.int32]
    reason: FinishReason
    path: Path


class Hypotheses:
    """The best finished beams of a group, at most as many as it has beams. Follows ``BeamHypotheses``.

    Attributes:
        kept: the hypotheses, oldest first.
    """

    __slots__ = ("_early_stopping", "_length_penalty", "_most_new", "_size", "_worst", "kept")

    def __init__(
        self, size: int, length_penalty: float, early_stopping: bool | Literal["never"], most_new_tokens: int
    ) -> None:
        """Start empty.

        Args:
            size: beams of the group.
            length_penalty: the power of the length that scores are divided by.
            early_stopping: as in `GenerationConfig`.
            most_new_tokens: how many tokens a beam may generate at most.
        """
        self.kept: list[Hypothesis] = []
        self._size = size
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._most_new = most_new_tokens
        self._worst = 1e9

    def wants(self, log_probability: float, new_tokens: int) -> bool:
        """Return whether a beam with this sum of log-probabilities and so many generated tokens would be kept."""
        return len(self.kept) < self._size or self._normalized(log_probability, new_tokens) > self._worst

    def add(
        self,
        log_probability: float,
        new_tokens: int,
        tokens: NDArray[np.int32],
        reason: FinishReason,
        path: Path,
    ) -> None:
        """Keep a finished beam that is wanted, in place of the worst when there are enough.

        Args:
            log_probability: sum over its generated tokens, float32 precision.
            new_tokens: generated tokens, the end token included.
            tokens: see `Hypothesis`.
            reason: see `Hypothesis`.
            path: see `Hypothesis`.
        """
        score = self._normalized(log_probability, new_tokens)
        self.kept.append(Hypothesis(score, tokens, reason, path))
        if len(self.kept) > self._size:
            ranked = sorted((hypothesis.score, place) for place, hypothesis in enumerate(self.kept))
            del self.kept[ranked[0][1]]
            self._worst = ranked[1][0]
        else:
            self._worst = min(score, self._worst)

    def are_final(self, best_log_probability: float, new_tokens: int) -> bool:
        """Return whether the search of this group may stop.

        Args:
            best_log_probability: of the best candidate of this step.
            new_tokens: generated tokens of that candidate.
        """
        if len(self.kept) < self._size:
            return False
        if self._early_stopping is True:
            return True
        # A penalty above 0 favours length, so the best that "never" must still expect has the largest length.
        longest = self._early_stopping == "never" and self._length_penalty > 0
        return self._worst >= self._normalized(best_log_probability, self._most_new if longest else new_tokens)

    def _normalized(self, log_probability: float, new_tokens: int) -> float:
        try:
            divisor = float(new_tokens) ** self._length_penalty
        except OverflowError:
            divisor = math.inf
        return log_probability / divisor if divisor else -math.inf
