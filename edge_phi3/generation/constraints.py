"""Sequences that are held to a language, such as JSON that follows a schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import Step
from edge_phi3.generation.logits import Scores
from edge_phi3.generation.sampling import SequenceDecoder
from edge_phi3.generation.stopping import Stopping

_NO_CHOICE: Final = (
    "The answer's format leaves no token to go on with: every token that it allows is banned (see `logit_bias`,"
    " `suppress_tokens`, `bad_words_ids`, `min_new_tokens`), or the scores hold NaN or infinity."
)


class TokenConstraint(Protocol):
    """Which tokens may come next in one sequence."""

    def permits(self, token: int) -> bool:
        """Return whether a token may come next; an end token may when what there is is whole."""

    def mask(self, scores: NDArray[np.float32]) -> None:
        """Set the score of every token that may not come next to minus infinity.

        Args:
            scores: of one row, shape (vocabulary,); changed in place.
        """

    def accept(self, token: int) -> None:
        """Go on with a token that may come next and is no end token."""

    def clone(self) -> Self:
        """Return a copy that goes its own way."""


class ConstraintProcessor:
    """Bans what the constraints of the rows do not permit. It comes last, so that nothing lifts its bans.

    Attributes:
        constraints: one for each row.
    """

    def __init__(self, constraint: TokenConstraint, *, best_only: bool) -> None:
        """Take the constraint of the first row, and whether nothing but the best token of each row is read."""
        self.constraints = [constraint]
        self._best_only = best_only

    def __call__(self, _tokens: NDArray[np.int32], scores: Scores) -> None:
        """Mask the rows. Where only the best token is read and it is permitted, there is nothing to do."""
        for constraint, row in zip(self.constraints, scores, strict=True):
            if not self._best_only or not constraint.permits(int(row.argmax())):
                constraint.mask(row)


class ConstrainedDecoder(SequenceDecoder):
    """Greedy decoding or sampling of sequences that a constraint holds."""

    __slots__ = ("_processor",)

    def __init__(
        self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping, constraint: TokenConstraint
    ) -> None:
        super().__init__(config, prompt, stopping)
        best_only = not config.do_sample and not config.records_scores
        self._processor = ConstraintProcessor(constraint.clone(), best_only=best_only)
        self.processors = (*self.processors, self._processor)

    def accept_all(self, tokens: Sequence[int]) -> Step:
        """Continue all live sequences and their constraints.

        Args:
            tokens: one for each live sequence.
        """
        before = self._processor.constraints
        for place, token in enumerate(tokens):
            # Greedy decoding takes some token, also where all are banned.
            if not before[place if len(before) > 1 else 0].permits(token):
                self._processor.constraints = []
                return self.fail(_NO_CHOICE)
        step = super().accept_all(tokens)
        shared = len(set(step.parents)) < len(step.parents)
        constraints = [before[parent].clone() if shared else before[parent] for parent in step.parents]
        for constraint, token in zip(constraints, step.tokens, strict=True):
            constraint.accept(token)
        self._processor.constraints = constraints
        return step
