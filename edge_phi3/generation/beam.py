"""Beam search, beam-search sampling and group (diverse) beam search."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import (
    NO_CHOICE,
    Decoder,
    GenerationError,
    GenerationResult,
    Step,
    TokenScore,
    Turn,
    fail_alone,
)
from edge_phi3.generation.drawing import random_stream
from edge_phi3.generation.logits import Candidates, Rows, Scores, log_softmax, top_of_all
from edge_phi3.generation.processors import HammingDiversity
from edge_phi3.generation.stopping import FinishReason, Stopping
from edge_phi3.generation.warpers import Warping, warp

_UNREACHED: Final = np.float32(-1e9)
_VANISHING: Final = np.float32(103)
"""How far below the best a log-probability is no float32 probability any more."""


class Picks(NamedTuple):
    """The best continuations of one group, best first: beam scores after them, beams within the group, tokens.

    `processed` are the processed scores they were picked from, a row for each beam; the others are of shape (n,).
    """

    totals: Scores
    beams: Rows
    tokens: NDArray[np.int32]
    processed: Candidates

    def score(self, beam: int, token: int) -> float:
        """Return the processed score of a token beside a beam."""
        scores, tokens = self.processed.scores[beam], self.processed.tokens
        # Padding holds token 0 with the score minus infinity.
        return float(scores[token] if tokens is None else scores[tokens[beam] == token].max(initial=-np.inf))


@dataclass(slots=True)
class Hypothesis:
    """One finished beam: `score` is the sum of its log-probabilities over a power of the generated length.

    `tokens` are token ids, prompt included, without the end token, shape (n,); `scores` those of its generated tokens,
    the end token included, where they are recorded.
    """

    score: float
    tokens: NDArray[np.int32]
    reason: FinishReason
    scores: list[TokenScore]


@dataclass(slots=True)
class Hypotheses:
    """The best finished beams of a group of `size` beams, oldest first. Follows ``BeamHypotheses``.

    `worst` is the score that another must beat when there are enough. With `only_possible`, those of no probability are
    left out.
    """

    size: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    most_new_tokens: int
    only_possible: bool = False
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
        """Keep a finished beam with the sum of the log-probabilities of its new tokens, the end token included.

        It takes the place of the worst when there are enough, unless it is no better.
        """
        if self.only_possible and not log_probability > -math.inf:
            return
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
        """Return whether the search of this group may stop, whose best candidate of this step has `new_tokens`."""
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


class BeamDecoder(Decoder):
    """Beam search in all its forms. Follows ``GenerationMixin._beam_search``, ``_group_beam_search`` and their scorer.

    Beams are numbered through all groups. The history holds all of them; rows of logits are wanted only for the
    groups that are not done, and at first for the prompt, whose row stands for all beams.
    """

    only_possible = False
    """Whether a beam of no probability is no answer."""

    def __init__(self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping) -> None:
        super().__init__(config, prompt, stopping, beams=config.num_beams)
        groups, ends = config.num_beam_groups, config.eos_token_id
        self.chooser = _choose
        self._config = config
        self._size = config.num_beams // groups
        # Enough that every beam can go on even when its best continuations all end.
        self._picked = max(2, 1 + len(ends)) * self._size
        self._pad = config.pad_token_id if config.pad_token_id is not None else max((*ends[:1], 0))
        self._done = [False] * groups
        self._live = np.zeros(1, dtype=np.intp)
        self._reason: FinishReason = "length"
        most_new = stopping.total_length - len(prompt)
        self._hypotheses = [
            Hypotheses(self._size, config.length_penalty, config.early_stopping, most_new, self.only_possible)
            for _ in range(groups)
        ]
        # Only the first beam of a group counts at first, or all would choose alike.
        self._beam_scores = np.full(config.num_beams, _UNREACHED, dtype=np.float32)
        self._beam_scores[:: self._size] = 0
        self._scores: list[list[TokenScore]] = [[] for _ in range(config.num_beams)]
        self._diversity = next((each for each in self.processors if isinstance(each, HammingDiversity)), None)
        self._warping = Warping.of(config)
        seed = secrets.randbits(64) if config.seed is None else config.seed
        self._generator = random_stream(seed, 0) if config.do_sample else None

    def step(self, logits: Scores) -> Step:
        """Choose the continuations of all beams from logits of shape (rows, vocabulary), which are overwritten."""
        log_softmax(logits)
        size, beams = self._size, self._config.num_beams
        row_of_beam = np.zeros(beams, dtype=np.intp)
        if self.history.length == self.prompt_length:
            logits = np.repeat(logits, beams, axis=0)
        else:
            row_of_beam[self._live] = np.arange(len(self._live))
        parents = np.zeros(beams, dtype=np.intp)
        tokens = np.full(beams, self._pad, dtype=np.int32)
        recorded: list[list[TokenScore]] = [[] for _ in range(beams)]
        row = 0
        for group, done in enumerate(self._done):
            own = slice(group * size, group * size + size)
            if done:
                parents[own] = own.start
                continue
            picks = self._pick(logits[row : row + size], own, tokens)
            row += size
            if picks is None or not self._continue(picks, group, parents, tokens, recorded):
                return self.fail(GenerationError(NO_CHOICE))
        self._scores = recorded
        self._go_on(parents, tokens)
        if all(self._done) or self._is_stopped():
            self._finish()
            return Step()
        self._live = np.flatnonzero(np.repeat(~np.array(self._done), size))
        self.rows = len(self._live)
        return Step(row_of_beam[parents[self._live]].tolist(), tokens[self._live].tolist())

    def row_tokens(self) -> NDArray[np.int32]:
        """Return the tokens of the beams of groups that are not done, shape ``(rows, length)``."""
        tokens = self.history.tokens
        return tokens if self.rows == len(tokens) else tokens[self._live]

    def last_tokens(self) -> list[int]:
        """Return the newest token of each beam of `row_tokens`."""
        return [self.history.last[beam] for beam in self._live.tolist()]

    def _go_on(self, parents: Rows, tokens: NDArray[np.int32]) -> None:
        """Continue the beams: each goes on from its parent with its token."""
        self.history.extend(parents, tokens)

    def _process(self, own: slice, scores: Scores) -> None:
        """Run the logits processors over the rows of a group, in place."""
        for processor in self.processors:
            processor(self.history.tokens[own], scores)

    def _pick(self, scores: Scores, own: slice, tokens: NDArray[np.int32]) -> Picks | None:
        """Return the best continuations of one group, or None when the scores allow no choice.

        `own` are the group's beams, and `scores` their log-probabilities, which are overwritten; `tokens` begins with
        what the groups before chose in this step.
        """
        if self._diversity is not None:
            self._diversity.chosen = tokens[: own.start]
        self._process(own, scores)
        offsets = self._beam_scores[own]
        if self._generator is not None:
            return self._sampled(warp(scores, [self._warping] * len(scores)), offsets, self._generator)
        return Picks(*top_of_all(scores, offsets, self._picked), Candidates(scores))

    def _sampled(self, left: Candidates, offsets: Scores, generator: np.random.Generator) -> Picks | None:
        """Draw continuations without replacement from the distribution over all beams, best first.

        Adding Gumbel noise to log-probabilities and taking the highest draws without replacement, as
        ``torch.multinomial`` does. Where too few have a probability above 0, the best of the rest are taken.
        """
        count = self._picked
        totals = (left.scores + offsets[:, None]).ravel()
        best = totals.max()
        if not np.isfinite(best):
            return None
        possible = np.flatnonzero(totals > best - _VANISHING)
        keys = totals[possible] - np.log(generator.standard_exponential(len(possible)))
        if len(keys) > count:
            highest = np.argpartition(keys, len(keys) - count)[len(keys) - count :]
            keys, possible = keys[highest], possible[highest]
        drawn = possible[np.argsort(-keys)]
        drawn = drawn[np.argsort(-totals[drawn], kind="stable")]
        if len(drawn) < count:
            others = np.flatnonzero((totals <= best - _VANISHING) & (totals > -np.inf))
            drawn = np.concatenate((drawn, others[np.argsort(-totals[others], kind="stable")]))[:count]
        beams, columns = np.divmod(drawn, left.scores.shape[1])
        tokens, sums = left.token_ids(beams, columns), totals[drawn]
        if len(drawn) < count:
            banned = np.setdiff1d(np.arange(self._config.vocab_size), tokens[beams == 0])[: count - len(drawn)]
            beams = np.concatenate((beams, np.zeros_like(banned)))
            tokens = np.concatenate((tokens, banned.astype(np.int32)))
            sums = np.concatenate((sums, np.full(len(banned), -np.inf, dtype=np.float32)))
        return Picks(sums, beams, tokens, left)

    def _continue(
        self, picks: Picks, group: int, parents: Rows, tokens: NDArray[np.int32], recorded: list[list[TokenScore]]
    ) -> bool:
        """Sort a group's picks into beams that go on and beams that end. Follows ``BeamSearchScorer.process``.

        The group's part of `parents`, `tokens` and `recorded` is filled in. Returns False when too few picks go on.
        """
        size, history, hypotheses = self._size, self.history, self._hypotheses[group]
        start = group * size
        new_tokens = history.length + 1 - self.prompt_length
        totals = picks.totals.tolist()
        going = start
        scores: list[float] = []
        chosen = zip(totals, picks.beams.tolist(), picks.tokens.tolist(), strict=True)
        for rank, (total, beam, token) in enumerate(chosen):
            parent = start + beam
            if token in self.stopping.ends:
                if rank < size:
                    # transformers writes the first end token, whichever was generated.
                    scored = self._scores_with(parent, picks, beam, self._config.eos_token_id[0])
                    hypotheses.offer(total, new_tokens, history.tokens[parent], "stop", scored)
                continue
            parents[going], tokens[going] = parent, token
            recorded[going] = self._scores_with(parent, picks, beam, token)
            scores.append(total)
            going += 1
            if going == start + size:
                break
        if going < start + size:
            return False
        self._beam_scores[start:going] = scores
        self._done[group] = hypotheses.are_final(totals[0], new_tokens)
        return True

    def _scores_with(self, parent: int, picks: Picks, beam: int, token: int) -> list[TokenScore]:
        if not self._config.records_scores or token < 0:
            return []
        score = picks.score(beam, token)
        return [*self._scores[parent], TokenScore(token, score, score)]

    def _is_stopped(self) -> bool:
        """Return whether all beams meet a criterion that ends the search, and note which."""
        stopping, tokens = self.stopping, self._stopping_lines()
        bound = stopping.bound(self.history.length)
        self._reason = bound or "stop_string"
        if bound is None and stopping.strings:
            return all(line[-1] in stopping.ends or stopping.is_completed(line) for line in tokens)
        return bound is not None

    def _stopping_lines(self) -> NDArray[np.int32]:
        """Return the tokens of the beams that must all meet one."""
        return self.history.tokens

    def _finish(self) -> None:
        """Add the beams that are still open to the hypotheses."""
        self.finished = True
        self.rows = 0
        new_tokens = self.history.length - self.prompt_length
        for beam in np.flatnonzero(np.repeat(~np.array(self._done), self._size)).tolist():
            total, tokens, scored = float(self._beam_scores[beam]), self.history.tokens[beam], self._scores[beam]
            self._hypotheses[beam // self._size].offer(total, new_tokens, tokens, self._reason, scored)

    def _result(self) -> GenerationResult:
        """Return the best sequences. Follows ``BeamSearchScorer.finalize``."""
        found = [hypothesis for hypotheses in self._hypotheses for hypothesis in hypotheses.kept]
        # Of equal scores the later comes first, as when a sorted list is emptied from its end.
        best = sorted(found, key=lambda hypothesis: hypothesis.score)[::-1][: self._config.num_return_sequences]
        longest = max(len(hypothesis.tokens) for hypothesis in best)
        width = min(longest + 1, self.stopping.total_length)
        return GenerationResult(
            self.prompt_length,
            [self._with_end(hypothesis, width) for hypothesis in best],
            [hypothesis.reason for hypothesis in best],
            [hypothesis.score for hypothesis in best],
            [hypothesis.scores for hypothesis in best] if self._config.records_scores else None,
        )

    def _with_end(self, hypothesis: Hypothesis, width: int) -> NDArray[np.int32]:
        """Append the first end token where it fits, be the beam ended or cut off, as transformers does."""
        ends = self._config.eos_token_id
        if len(hypothesis.tokens) < width and ends and ends[0] >= 0:
            return np.append(hypothesis.tokens, np.int32(ends[0]))
        return hypothesis.tokens


def _choose(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
    for turn in turns:
        decoder = turn.decoder
        assert isinstance(decoder, BeamDecoder)
        try:
            with np.errstate(all="ignore"):
                steps[turn.place] = decoder.step(logits[turn.row : turn.row + decoder.rows])
        except Exception as error:  # noqa: BLE001 - it is logged
            fail_alone(turn, steps, error)
