"""Sequences and beams that are held to a language, such as that of a grammar."""

from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.beam import BeamDecoder, Picks
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import GenerationError, Step, TokenScore
from edge_phi3.generation.logits import Candidates, Rows, Scores
from edge_phi3.generation.sampling import SequenceDecoder
from edge_phi3.generation.stopping import Stopping

_NOT_PERMITTED: Final = (
    "The answer's format leaves no token to go on with: every token that it allows is banned (see `logit_bias`,"
    " `suppress_tokens`, `bad_words_ids`, `sequence_bias`, `min_new_tokens`, `forced_eos_token_id`), it takes too long"
    " to follow, or the scores hold NaN or infinity."
)


class TokenConstraint(Protocol):
    """Which tokens may come next in one sequence."""

    def prepare(self) -> None:
        """Find out which tokens may come next, when there is time for it."""

    def permits(self, token: int) -> bool:
        """Return whether a token may come next; an end token may when what there is is whole."""

    def mask(self, scores: NDArray[np.float32]) -> None:
        """Set the scores, shape (vocabulary,), of all tokens that may not come next to minus infinity, in place."""

    def forced(self, most: int) -> list[int]:
        """Return up to so many tokens that are likely to come next, since no other text may."""

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

    def forced(self, row: int, most: int) -> list[int]:
        """Return what the constraint of a row leaves no choice about."""
        return self._constraints[row].forced(most)

    def process(self, scores: Scores) -> None:
        """Run the processors, and then ban what the constraints do not permit, so that nothing lifts their bans."""
        super().process(scores)
        for constraint, row in zip(self._constraints, scores, strict=True):
            # Where only the best token is read and it is permitted, there is nothing to do.
            if not self._best_only or not constraint.permits(int(row.argmax())):
                constraint.mask(row)
                if not row.max() > -np.inf:
                    raise GenerationError(_NOT_PERMITTED)

    def accept_all(self, tokens: list[int]) -> Step:
        """Continue all live sequences, and their constraints, with a token for each."""
        before = self._constraints
        step = super().accept_all(tokens)
        shared = len(set(step.parents)) < len(step.parents)
        self._constraints = [before[parent].clone() if shared else before[parent] for parent in step.parents]
        for constraint, token in zip(self._constraints, step.tokens, strict=True):
            constraint.accept(token)
        return step


class ConstrainedBeamDecoder(BeamDecoder):
    """Beam search, in all its forms, among the sequences that a constraint permits.

    As transformers does under ``prefix_allowed_tokens_fn``, beams that nothing can follow go on with scores of minus
    infinity until others take their places. But they are never answers, and a group that has no others is done.
    """

    only_possible = True

    def __init__(
        self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping, constraint: TokenConstraint
    ) -> None:
        super().__init__(config, prompt, stopping)
        # One for each beam, or None for a beam that nothing can follow.
        self._constraints: list[TokenConstraint | None] = [constraint.clone()] * config.num_beams
        self._beam_scores[self._beam_scores < 0] = -np.inf  # no answer comes of a beam that was not reached

    def prepare(self) -> None:
        """Find out what the constraints permit next, before the scores are there."""
        for constraint in {id(each): each for each in self._constraints if each is not None}.values():
            constraint.prepare()

    def _process(self, own: slice, scores: Scores) -> None:
        """Run the processors, and then ban what the constraints do not permit, so that nothing lifts their bans."""
        super()._process(own, scores)
        for beam, row in enumerate(scores, own.start):
            constraint = self._constraints[beam]
            if constraint is not None:
                constraint.mask(row)
                # Beams that differ in their end tokens are one text.
                ends = [token for token in self._config.eos_token_id if 0 <= token < len(row)]
                row[sorted(set(ends), key=row.__getitem__)[:-1]] = -np.inf
            if constraint is None or row.max() == -np.inf:
                self._beam_scores[beam] = -np.inf
                row.fill(0)  # no warper makes NaN of it

    def _sampled(self, left: Candidates, offsets: Scores, generator: np.random.Generator) -> Picks | None:
        if offsets.max() > -np.inf:
            return super()._sampled(left, offsets, generator)
        count = self._picked
        nothing, pads = np.full(count, -np.inf, np.float32), np.full(count, self._pad, np.int32)
        return Picks(nothing, np.zeros(count, np.intp), pads, left)

    def _continue(
        self, picks: Picks, group: int, parents: Rows, tokens: NDArray[np.int32], recorded: list[list[TokenScore]]
    ) -> bool:
        own = slice(group * self._size, (group + 1) * self._size)
        if picks.totals[0] == -np.inf:
            parents[own] = own.start
            self._beam_scores[own], self._done[group] = -np.inf, True
            return True
        went_on = super()._continue(picks, group, parents, tokens, recorded)
        self._done[group] = self._done[group] or self._beam_scores[own].max() == -np.inf
        return went_on

    def _go_on(self, parents: Rows, tokens: NDArray[np.int32]) -> None:
        super()._go_on(parents, tokens)
        before, self._constraints = self._constraints, [None] * len(parents)
        going = np.isfinite(self._beam_scores) & ~np.repeat(self._done, self._size)
        for beam in going.nonzero()[0].tolist():
            constraint = before[parents[beam]]
            if constraint is not None:
                self._constraints[beam] = constraint = constraint.clone()
                constraint.accept(int(tokens[beam]))

    def _stopping_lines(self) -> NDArray[np.int32]:
        return self.history.tokens[self._beam_scores > -np.inf]

    def _finish(self) -> None:
        super()._finish()
        found, wanted = sum(len(each.kept) for each in self._hypotheses), self._config.num_return_sequences
        if not found:
            self.fail(GenerationError(_NOT_PERMITTED))
        elif found < wanted:
            self.fail(GenerationError(f"The answer's format leaves {found} of the {wanted} answers asked for."))
