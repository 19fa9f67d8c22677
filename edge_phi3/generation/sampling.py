"""Greedy decoding and multinomial sampling: sequences that go on one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import (
    NO_ROWS,
    NO_TOKENS,
    Chooser,
    Decoder,
    FinishReason,
    GenerationResult,
    Step,
    TokenScore,
    Turn,
    rows_of,
)
from edge_phi3.generation.history import TokenHistory
from edge_phi3.generation.logits import Candidates, Rows, Scores, log_softmax, running_totals, weights
from edge_phi3.generation.processors import build_processors
from edge_phi3.generation.randomness import Uniforms, fresh_seed
from edge_phi3.generation.stopping import Stopping
from edge_phi3.generation.warpers import Warping, warp

_BLOCK: Final = 256
_SAME_ROW: Final = np.zeros(1, dtype=np.intp)
_NO_CHOICE: Final = (
    "The scores leave no token to sample: they hold NaN or infinity (see `remove_invalid_values`), or every token is"
    " banned (see `suppress_tokens`, `bad_words_ids`, `sequence_bias`, `no_repeat_ngram_size`)."
)


class SequenceDecoder(Decoder):
    """Greedy decoding, or sampling of one or several sequences. Follows ``GenerationMixin._sample``."""

    __slots__ = (
        "_live",
        "_stopping",
        "_uniforms",
        "prompt_length",
        "reasons",
        "records_scores",
        "scores",
        "sequences",
        "simple",
        "warping",
    )

    def __init__(self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping) -> None:
        super().__init__(TokenHistory(prompt))
        count = config.num_return_sequences
        self.processors = build_processors(config, prompt)
        self.prompt_length = len(prompt)
        self.records_scores = config.records_scores
        self.scores: list[list[TokenScore]] = [[] for _ in range(count)]
        self.sequences: list[NDArray[np.int32]] = [NO_TOKENS] * count
        self.reasons: list[FinishReason] = ["length"] * count
        self.warping = Warping.of(config)
        self.simple = count == 1 and not stopping.reads_text and config.max_time is None
        self._live = list(range(count))
        self._stopping = stopping
        self._uniforms: list[Uniforms] = []
        self.chooser: Chooser = _choose_greedily
        if config.do_sample:
            seed = fresh_seed() if config.seed is None else config.seed
            self._uniforms = [Uniforms(seed, sequence) for sequence in range(count)]
            self.chooser = _sampler(self.warping.active)

    @property
    def live(self) -> Sequence[int]:
        """Indices of the sequences that go on."""
        return self._live

    def uniforms(self) -> list[float]:
        """Draw one number for each live sequence."""
        return [self._uniforms[sequence].next() for sequence in self._live]

    def accept(self, token: int, row: NDArray[np.int32]) -> Step:
        """Continue the only sequence of a simple request.

        Args:
            token: the token.
            row: the same, shape (1,).
        """
        history, stopping = self.history, self._stopping
        history.append(token)
        emitted = ((0, token),)
        if token in stopping.ends:
            self.reasons[0] = "stop"
        elif history.length < stopping.total_length:
            return Step(_SAME_ROW, row, self._live, emitted)
        self.sequences[0] = history.tokens[0].copy()
        self._live = []
        self.rows = 0
        self.finished = True
        return Step(NO_ROWS, NO_TOKENS, (), emitted)

    def accept_all(self, tokens: NDArray[np.int32]) -> Step:
        """Continue all live sequences, and let go of those that end.

        Args:
            tokens: one for each live sequence, shape (n,).
        """
        history, stopping, live = self.history, self._stopping, self._live
        first = history.length == self.prompt_length
        parents = np.zeros(len(live), dtype=np.intp) if first else np.arange(len(live))
        history.extend(parents, tokens)
        emitted = list(zip(live, tokens.tolist(), strict=True))
        last: FinishReason | None = None
        if history.length >= stopping.total_length:
            last = "length"
        elif stopping.out_of_time():
            last = "time"
        going: list[int] = []
        for row, (sequence, token) in enumerate(emitted):
            reason = last
            if token in stopping.ends:
                reason = "stop"
            elif stopping.reads_text and stopping.completes_string(history.tokens[row]):
                reason = "stop_string"
            if reason is None:
                going.append(row)
            else:
                self.reasons[sequence] = reason
                self.sequences[sequence] = history.tokens[row].copy()
        if len(going) < len(live):
            kept = np.array(going, dtype=np.intp)
            parents, tokens = parents[kept], tokens[kept]
            self._live = [live[row] for row in going]
            history.keep(kept)
        self.rows = len(going)
        self.finished = not going
        return Step(parents, tokens, self._live, emitted)

    def result(self) -> GenerationResult:
        """Give what was generated.

        Raises:
            GenerationError: the request failed.
        """
        if self.error is not None:
            raise self.error
        scores = self.scores if self.records_scores else None
        return GenerationResult(self.prompt_length, self.sequences, self.reasons, None, scores)


def _processed_rows(turns: Sequence[Turn], logits: Scores) -> Scores:
    for turn in turns:
        if turn.decoder.processors:
            turn.decoder.process(logits[turn.row : turn.row + turn.decoder.rows])
    return rows_of(turns, logits)


def _choose_greedily(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
    scores = _processed_rows(turns, logits)
    best = scores.argmax(axis=1)
    tokens = best.astype(np.int32)
    listed = best.tolist()
    row = 0
    for turn in turns:
        decoder = turn.decoder
        assert isinstance(decoder, SequenceDecoder)
        if decoder.records_scores:
            _record_greedy(decoder, scores[row : row + decoder.rows], listed[row])
        if decoder.simple:
            steps[turn.place] = decoder.accept(listed[row], tokens[row : row + 1])
            row += 1
        else:
            end = row + decoder.rows
            drawn = tokens[row:end]
            if len(drawn) < len(decoder.live):
                drawn = np.repeat(drawn, len(decoder.live))
            steps[turn.place] = decoder.accept_all(drawn)
            row = end


def _record_greedy(decoder: SequenceDecoder, scores: Scores, token: int) -> None:
    # Greedy sequences of one request are all alike, so the first row stands for all.
    score = float(scores[0, token])
    normalized = scores[:1].copy()
    with np.errstate(all="ignore"):
        log_softmax(normalized)
    logprob = float(normalized[0, token])
    for sequence in decoder.live:
        decoder.scores[sequence].append(TokenScore(token, score, logprob))


@cache
def _sampler(active: tuple[str, ...]) -> Chooser:
    """Give the one chooser of all requests with these warpers."""

    def choose(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
        warpings: list[Warping] = []
        rows: list[int] = []
        uniforms: list[float] = []
        for turn in turns:
            decoder = turn.decoder
            assert isinstance(decoder, SequenceDecoder)
            first = len(warpings)
            drawn = decoder.uniforms()
            uniforms += drawn
            # Before the first step, all sequences are drawn from the prompt's one row.
            rows += [first] * len(drawn) if decoder.rows == 1 else range(first, first + decoder.rows)
            warpings += [decoder.warping] * decoder.rows
        scores = _processed_rows(turns, logits)
        with np.errstate(all="ignore"):
            draws = draw(warp(scores, warpings), np.array(rows), np.array(uniforms))
        _hand_out(turns, draws, steps)

    del active
    return choose


class Draws:
    """Tokens drawn from candidates.

    Attributes:
        tokens: shape (draws,), int32.
        scores: processed score of each, shape (draws,).
        logprobs: log-softmax of the processed scores at each, shape (draws,).
        possible: whether the row was a distribution at all, shape (draws,).
    """

    __slots__ = ("logprobs", "possible", "scores", "tokens")

    def __init__(
        self, tokens: NDArray[np.int32], scores: Scores, logprobs: Scores, possible: NDArray[np.bool_]
    ) -> None:
        self.tokens = tokens
        self.scores = scores
        self.logprobs = logprobs
        self.possible = possible


def draw(candidates: Candidates, rows: NDArray[np.intp], uniforms: NDArray[np.float64]) -> Draws:
    """Draw tokens by inverting the cumulative distribution of each row, in the order of token ids.

    Args:
        candidates: what is left of each row.
        rows: the row of each draw, shape (draws,).
        uniforms: a number in [0, 1) for each draw, shape (draws,).
    """
    scores = candidates.scores
    if candidates.tokens is None:
        columns, totals = _invert_whole(scores, rows, uniforms)
    else:
        columns, totals = _invert(weights(scores), rows, uniforms)
    possible = np.isfinite(totals) & (totals > 0)
    columns = np.where(possible, columns, 0)
    chosen = scores[rows, columns]
    logprobs = chosen - scores.max(axis=1)[rows] - np.log(totals).astype(np.float32)
    return Draws(candidates.token_ids(rows, columns), chosen, logprobs, possible)


def _invert(weighed: Scores, rows: Rows, uniforms: NDArray[np.float64]) -> tuple[Rows, NDArray[np.float64]]:
    """Find the first columns whose running totals exceed shares of their rows' totals, and give the totals too."""
    reached = running_totals(weighed)[rows]
    totals = reached[:, -1]
    # Below the total even where the product rounds up, so that a token of probability 0 is never reached.
    targets = np.minimum(uniforms * totals, np.nextafter(totals, 0))
    return np.minimum((reached <= targets[:, None]).sum(axis=1), reached.shape[1] - 1), totals


def _invert_whole(scores: Scores, rows: Rows, uniforms: NDArray[np.float64]) -> tuple[Rows, NDArray[np.float64]]:
    """Do the same over the whole vocabulary, row by row: first find the block, and then the column in it."""
    columns, totals = np.zeros_like(rows), np.empty(len(rows))
    starts = np.arange(0, scores.shape[1], _BLOCK)
    weighed = np.empty(scores.shape[1], dtype=np.float32)
    row = -1
    for place, uniform in enumerate(uniforms.tolist()):
        if rows[place] != row:
            row = rows[place]
            np.subtract(scores[row], scores[row].max(), out=weighed)
            np.exp(weighed, out=weighed)
            sums = np.add.reduceat(weighed, starts)
            reached = np.cumsum(sums, dtype=np.float64)
            total = reached[-1]
        totals[place] = total
        block = min(int(np.searchsorted(reached, min(uniform * total, np.nextafter(total, 0)), "right")), len(sums) - 1)
        inside = np.cumsum(weighed[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
        # The share within the block: its float64 sum may differ from its float32 sum in the last bits.
        share = (uniform * total - (reached[block] - sums[block])) / sums[block]
        target = min(max(share, 0.0) * inside[-1], np.nextafter(inside[-1], 0))
        columns[place] = starts[block] + min(int(np.searchsorted(inside, target, "right")), len(inside) - 1)
    return columns, totals


def _hand_out(turns: Sequence[Turn], draws: Draws, steps: list[Step]) -> None:
    tokens = draws.tokens
    listed = tokens.tolist()
    all_possible = bool(draws.possible.all())
    at = 0
    for turn in turns:
        decoder = turn.decoder
        assert isinstance(decoder, SequenceDecoder)
        end = at + len(decoder.live)
        if not all_possible and not draws.possible[at:end].all():
            steps[turn.place] = decoder.fail(_NO_CHOICE)
        else:
            if decoder.records_scores:
                for sequence, place in zip(decoder.live, range(at, end), strict=True):
                    score, logprob = float(draws.scores[place]), float(draws.logprobs[place])
                    decoder.scores[sequence].append(TokenScore(listed[place], score, logprob))
            if decoder.simple:
                steps[turn.place] = decoder.accept(listed[at], tokens[at:end])
            else:
                steps[turn.place] = decoder.accept_all(tokens[at:end])
        at = end
