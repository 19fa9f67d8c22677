"""Sequences that are held to a language, such as JSON that follows a schema."""

from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import GenerationError, Step
from edge_phi3.generation.logits import Scores
from edge_phi3.generation.sampling import SequenceDecoder
from edge_phi3.generation.stopping import Stopping

_NO_CHOICE: Final = (
    "The answer's format leaves no token to go on with: every token that it allows is banned (see `logit_bias`,"
    " `suppress_tokens`, `bad_words_ids`, `min_new_tokens`), it takes too long to follow, or the scores hold NaN or"
    " infinity."
)


class TokenConstraint(Protocol):
    """Which tokens may come next in one sequence."""

    def prepare(self) -> None:
        """Find out which tokens may come next, when there is time for it."""

    def permits(self, token: int) -> bool:
        """Return whether a token may come next; an end token may when what there is is whole."""

    def mask(self, scores: NDArray[np.float32]) -> None:
        """Set the scores, shape (vocabulary,), of all tokens that may not come next to minus infinity, in place."""

    def accept(self, token: int) -> None:
        """Go on with a token that may come next and is no end token."""

    def clone(self) -> Self:
        """Return a copy that goes its own way."""


class ConstrainedDecoder(SequenceDecoder):
    """Greedy decoding or sampling of sequences that a constraint holds."""

    def __init__(
        self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping, constraint: TokenConstraint
    ) -> None:
        super().__init__(config, prompt, stopping)
        self.processes = True
        self._constraints = [constraint.clone()]
        self._best_only = not config.do_sample and not config.records_scores

    def prepare(self) -> None:
        """Find out what the constraints permit next, before the scores are there."""
        if not self._best_only:
            for constraint in self._constraints:
                constraint.prepare()

    def process(self, scores: Scores) -> None:
        """Run the processors, and then ban what the constraints do not permit, so that nothing lifts their bans."""
        super().process(scores)
        for constraint, row in zip(self._constraints, scores, strict=True):
            # Where only the best token is read and it is permitted, there is nothing to do.
            if not self._best_only or not constraint.permits(int(row.argmax())):
                constraint.mask(row)
                if not row.max() > -np.inf:
                    raise GenerationError(_NO_CHOICE)

    def accept_all(self, tokens: list[int]) -> Step:
        """Continue all live sequences, and their constraints, with a token for each."""
        before = self._constraints
        step = super().accept_all(tokens)
        shared = len(set(step.parents)) < len(step.parents)
        self._constraints = [before[parent].clone() if shared else before[parent] for parent in step.parents]
        for constraint, token in zip(self._constraints, step.tokens, strict=True):
            constraint.accept(token)
        return step
