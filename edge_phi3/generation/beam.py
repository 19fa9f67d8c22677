"""Beam search, beam-search sampling and group (diverse) beam search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import (
    Decoder,
    FinishReason,
    GenerationResult,
    Isolated,
    Step,
    TokenScore,
    Turn,
)
from edge_phi3.generation.drawing import random_stream
from edge_phi3.generation.history import TokenHistory
from edge_phi3.generation.hypotheses import Hypotheses, Hypothesis, Path
from edge_phi3.generation.logits import Candidates, Rows, Scores, log_softmax, top_of_all
from edge_phi3.generation.processors import HammingDiversity, build_processors
from edge_phi3.generation.stopping import Stopping
from edge_phi3.generation.warpers import Warping, warp

_UNREACHED: Final = np.float32(-1e9)
_VANISHING: Final = np.float32(103)
"""How far below the best a log-probability is no float32 probability any more."""
_NO_CHOICE: Final = (
    "The scores leave no token to go on with: they hold NaN or infinity (see `remove_invalid_values`), or every token"
    " is banned (see `suppress_tokens`, `bad_words_ids`, `sequence_bias`, `no_repeat_ngram_size`)."
)


class Picks(NamedTuple):
    """The best continuations of one group, best first.

    Attributes:
        totals: beam scores after the continuation, shape (n,).
        beams: the beam of each within its group, shape (n,).
        tokens: shape (n,).
        processed: the processed scores they were picked from, a row for each beam.
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


class BeamDecoder(Decoder):
    """Beam search in all its forms. Follows ``GenerationMixin._beam_search``, ``_group_beam_search`` and their scorer.

    Beams are numbered through all groups. The history holds all of them; rows of logits are wanted only for the
    groups that are not done, and at first for the prompt, whose row stands for all beams.
    """

    __slots__ = (
        "_beam_scores",
        "_config",
        "_diversity",
        "_done",
        "_generator",
        "_hypotheses",
        "_live",
        "_pad",
        "_paths",
        "_picked",
        "_reason",
        "_size",
        "_stopping",
        "_warping",
        "prompt_length",
    )

    def __init__(self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping) -> None:
        super().__init__(TokenHistory(prompt, rows=config.num_beams))
        groups, ends = config.num_beam_groups, config.eos_token_id
        self.prompt_length = len(prompt)
        self.processors = build_processors(config, prompt)
        self.chooser = _choose
        self._config = config
        self._stopping = stopping
        self._size = config.num_beams // groups
        # Enough that every beam can go on even when its best continuations all end.
        self._picked = max(2, 1 + len(ends)) * self._size
        self._pad = config.pad_token_id if config.pad_token_id is not None else max((*ends[:1], 0))
        self._done = [False] * groups
        self._live = np.zeros(1, dtype=np.intp)
        self._reason: FinishReason = "length"
        most_new = stopping.total_length - len(prompt)
        self._hypotheses = [
            Hypotheses(self._size, config.length_penalty, config.early_stopping, most_new) for _ in range(groups)
        ]
        # Only the first beam of a group counts at first, or all would choose alike.
        self._beam_scores = np.full(config.num_beams, _UNREACHED, dtype=np.float32)
        self._beam_scores[:: self._size] = 0
        self._paths: list[Path] = [None] * config.num_beams
        self._diversity = next((each for each in self.processors if isinstance(each, HammingDiversity)), None)
        self._warping = Warping.of(config)
        self._generator = random_stream(config.seed, 0) if config.do_sample else None

    def step(self, logits: Scores) -> Step:
        """Choose the continuations of all beams.

        Args:
            logits: shape (rows, vocabulary); overwritten.
        """
        log_softmax(logits)
        size, beams = self._size, self._config.num_beams
        row_of_beam = np.zeros(beams, dtype=np.intp)
        if self.history.length == self.prompt_length:
            logits = np.repeat(logits, beams, axis=0)
        else:
            row_of_beam[self._live] = np.arange(len(self._live))
        parents = np.zeros(beams, dtype=np.intp)
        tokens = np.full(beams, self._pad, dtype=np.int32)
        paths: list[Path] = [None] * beams
        row = 0
        for group, done in enumerate(self._done):
            own = slice(group * size, group * size + size)
            if done:
                parents[own] = own.start
                continue
            picks = self._pick(logits[row : row + size], own, tokens)
            row += size
            if picks is None or not self._continue(picks, group, parents, tokens, paths):
                return self.fail(_NO_CHOICE)
        self._paths = paths
        self.history.extend(parents, tokens)
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

    def _pick(self, scores: Scores, own: slice, tokens: NDArray[np.int32]) -> Picks | None:
        """Find the best continuations of one group, or None when the scores allow no choice.

        Args:
            scores: log-probabilities, shape (beams of the group, vocabulary); overwritten.
            own: the group's beams.
            tokens: what the groups before chose in this step, shape (beams,).
        """
        if self._diversity is not None:
            self._diversity.chosen = tokens[: own.start]
        for processor in self.processors:
            processor(self.history.tokens[own], scores)
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

    def _continue(self, picks: Picks, group: int, parents: Rows, tokens: NDArray[np.int32], paths: list[Path]) -> bool:
        """Sort a group's picks into beams that go on and beams that end. Follows ``BeamSearchScorer.process``.

        Args:
            picks: best first.
            group: index of the group.
            parents: the group's part is filled in.
            tokens: the group's part is filled in.
            paths: the group's part is filled in.

        Returns:
            False when too few picks go on.
        """
        size, history, hypotheses = self._size, self.history, self._hypotheses[group]
        start = group * size
        new_tokens = history.length + 1 - self.prompt_length
        totals = picks.totals.tolist()
        going = start
        scores: list[float] = []
        for rank, (total, beam, token) in enumerate(
            zip(totals, picks.beams.tolist(), picks.tokens.tolist(), strict=True)
        ):
            parent = start + beam
            if token in self._stopping.ends:
                if rank < size and hypotheses.wants(total, new_tokens):
                    # transformers writes the first end token, whichever was generated.
                    path = self._extended(parent, picks, beam, self._config.eos_token_id[0])
                    hypotheses.add(total, new_tokens, history.tokens[parent].copy(), "stop", path)
                continue
            parents[going], tokens[going] = parent, token
            paths[going] = self._extended(parent, picks, beam, token)
            scores.append(total)
            going += 1
            if going == start + size:
                break
        if going < start + size:
            return False
        self._beam_scores[start:going] = scores
        self._done[group] = hypotheses.are_final(totals[0], new_tokens)
        return True

    def _extended(self, parent: int, picks: Picks, beam: int, token: int) -> Path:
        if not self._config.records_scores or token < 0:
            return None
        score = picks.score(beam, token)
        return self._paths[parent], TokenScore(token, score, score)

    def _is_stopped(self) -> bool:
        """Return whether all beams meet a criterion that ends the search, and note which."""
        stopping, tokens = self._stopping, self.history.tokens
        if self.history.length >= stopping.total_length:
            self._reason = "length"
            return True
        if stopping.out_of_time():
            self._reason = "time"
            return True
        if stopping.reads_text:
            self._reason = "stop_string"
            return all(line[-1] in stopping.ends or stopping.completes_string(line) for line in tokens)
        return False

    def _finish(self) -> None:
        """Add the beams that are still open to the hypotheses."""
        self.finished = True
        self.rows = 0
        new_tokens = self.history.length - self.prompt_length
        for group, hypotheses in enumerate(self._hypotheses):
            if self._done[group]:
                continue
            for beam in range(group * self._size, (group + 1) * self._size):
                total = float(self._beam_scores[beam])
                if hypotheses.wants(total, new_tokens):
                    tokens = self.history.tokens[beam].copy()
                    hypotheses.add(total, new_tokens, tokens, self._reason, self._paths[beam])

    def result(self) -> GenerationResult:
        """Return the best sequences. Follows ``BeamSearchScorer.finalize``.

        Raises:
            GenerationError: the request failed.
        """
        if self.error is not None:
            raise self.error
        found = [hypothesis for hypotheses in self._hypotheses for hypothesis in hypotheses.kept]
        # Of equal scores the later comes first, as when a sorted list is emptied from its end.
        best = sorted(found, key=lambda hypothesis: hypothesis.score)[::-1][: self._config.num_return_sequences]
        longest = max(len(hypothesis.tokens) for hypothesis in best)
        width = min(longest + 1, self._stopping.total_length)
        scores = [_scores(hypothesis) for hypothesis in best] if self._config.records_scores else None
        return GenerationResult(
            self.prompt_length,
            [self._with_end(hypothesis, width) for hypothesis in best],
            [hypothesis.reason for hypothesis in best],
            [hypothesis.score for hypothesis in best],
            scores,
        )

    def _with_end(self, hypothesis: Hypothesis, width: int) -> NDArray[np.int32]:
        """Append the first end token where it fits, be the beam ended or cut off, as transformers does."""
        ends = self._config.eos_token_id
        if len(hypothesis.tokens) < width and ends and ends[0] >= 0:
            return np.append(hypothesis.tokens, np.int32(ends[0]))
        return hypothesis.tokens


def _scores(hypothesis: Hypothesis) -> list[TokenScore]:
    scores: list[TokenScore] = []
    path = hypothesis.path
    while path is not None:
        path, score = path
        scores.append(score)
    return scores[::-1]


def _choose(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
    for turn in turns:
        decoder = turn.decoder
        assert isinstance(decoder, BeamDecoder)
        with Isolated(turn, steps), np.errstate(all="ignore"):
            steps[turn.place] = decoder.step(logits[turn.row : turn.row + decoder.rows])
