"""The finished beams of one group: which are kept, and when no better ones can come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.decoding import TokenScore
from edge_phi3.generation.stopping import FinishReason


@dataclass(slots=True)
class Hypothesis:
    """One finished beam.

    Attributes:
        score: sum of log-probabilities over a power of the generated length.
        tokens: token ids, prompt included, without the end token; shape (n,).
        reason: why it ended.
        scores: how its generated tokens scored, the end token included; empty unless recorded.
    """

    score: float
    tokens: NDArray[np.int32]
    reason: FinishReason
    scores: list[TokenScore]


@dataclass(slots=True)
class Hypotheses:
    """The best finished beams of a group, at most as many as it has beams. Follows ``BeamHypotheses``.

    Attributes:
        size: beams of the group.
        length_penalty: the power of the length that scores are divided by.
        early_stopping: as in `GenerationConfig`.
        most_new_tokens: how many tokens a beam may generate at most.
        kept: the hypotheses, oldest first.
        worst: the score that another must beat when there are enough.
    """

    size: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    most_new_tokens: int
    kept: list[Hypothesis] = field(default_factory=list)
    worst: float = 1e9

    def offer(
        self,
        log_probability: float,
        new_tokens: int,
        tokens: NDArray[np.int32],
        reason: FinishReason,
        scores: list[TokenScore],
    ) -> None:
        """Keep a finished beam, in place of the worst when there are enough, unless it is no better.

        `log_probability` is the sum over its generated tokens, of which there are `new_tokens`, the end token
        included; the others are those of `Hypothesis`.
        """
        score = self._normalized(log_probability, new_tokens)
        if len(self.kept) < self.size or score > self.worst:
            self.kept.append(Hypothesis(score, tokens.copy(), reason, scores))
            if len(self.kept) > self.size:
                ranked = sorted((hypothesis.score, place) for place, hypothesis in enumerate(self.kept))
                del self.kept[ranked[0][1]]
                self.worst = ranked[1][0]
            else:
                self.worst = min(score, self.worst)

    def are_final(self, best_log_probability: float, new_tokens: int) -> bool:
        """Return whether the search of this group may stop.

        Args:
            best_log_probability: of the best candidate of this step.
            new_tokens: generated tokens of that candidate.
        """
        if len(self.kept) < self.size:
            return False
        if self.early_stopping is True:
            return True
        # A penalty above 0 favours length, so the best that "never" must still expect has the largest length.
        longest = self.early_stopping == "never" and self.length_penalty > 0
        return self.worst >= self._normalized(best_log_probability, self.most_new_tokens if longest else new_tokens)

    def _normalized(self, log_probability: float, new_tokens: int) -> float:
        try:
            divisor = float(new_tokens) ** self.length_penalty
        except OverflowError:
            divisor = math.inf
        return log_probability / divisor if divisor else -math.inf
