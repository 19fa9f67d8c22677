"""Greedy decoding and multinomial sampling: sequences that go on one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import (
    NO_TOKENS,
    Chooser,
    Decoder,
    FinishReason,
    GenerationResult,
    Isolated,
    Step,
    TokenLogprobs,
    TokenScore,
    Turn,
    rows_of,
)
from edge_phi3.generation.drawing import Draws, Uniforms, draw, fresh_seed
from edge_phi3.generation.history import TokenHistory
from edge_phi3.generation.logits import Scores, log_softmax
from edge_phi3.generation.processors import build_processors
from edge_phi3.generation.stopping import Stopping
from edge_phi3.generation.warpers import Warping, warp

NO_CHOICE: Final = (
    "The scores leave no token to sample: they hold NaN or infinity (see `remove_invalid_values`), or every token is"
    " banned (see `suppress_tokens`, `bad_words_ids`, `sequence_bias`, `no_repeat_ngram_size`)."
)


class SequenceDecoder(Decoder):
    """Greedy decoding, or sampling of one or several sequences. Follows ``GenerationMixin._sample``.

    Attributes:
        live: indices of the sequences that go on.
    """

    __slots__ = (
        "_stopping",
        "_uniforms",
        "live",
        "logprobs",
        "prompt_length",
        "reasons",
        "records_scores",
        "scores",
        "sequences",
        "warping",
    )

    def __init__(self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping) -> None:
        super().__init__(TokenHistory(prompt))
        count = config.num_return_sequences
        self.processors = build_processors(config, prompt)
        self.prompt_length = len(prompt)
        self.records_scores = config.records_scores
        self.scores: list[list[TokenScore]] = [[] for _ in range(count)]
        self.logprobs: list[list[TokenLogprobs]] | None = None
        self.sequences: list[NDArray[np.int32]] = [NO_TOKENS] * count
        self.reasons: list[FinishReason] = ["length"] * count
        self.warping = Warping.of(config)
        self.live = list(range(count))
        self._stopping = stopping
        self._uniforms: list[Uniforms] = []
        self.chooser: Chooser = choose_greedily
        if config.do_sample:
            seed = fresh_seed() if config.seed is None else config.seed
            self._uniforms = [Uniforms(seed, sequence) for sequence in range(count)]
            self.chooser = _sampler(self.warping.active)

    def uniforms(self) -> list[float]:
        """Draw one number for each live sequence."""
        return [self._uniforms[sequence].next() for sequence in self.live]

    def accept_all(self, tokens: Sequence[int]) -> Step:
        """Continue all live sequences, and let go of those that end.

        Args:
            tokens: one for each live sequence.
        """
        history, stopping, live = self.history, self._stopping, self.live
        parents: Sequence[int] = range(len(live))
        if history.rows == len(live):
            history.append(tokens)
        else:
            # Before the first step, the prompt's one row stands for all sequences.
            parents = [0] * len(live)
            history.extend(np.array(parents), np.array(tokens, dtype=np.int32))
        emitted = list(zip(live, tokens, strict=True))
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
        self.rows = len(going)
        self.finished = not going
        if len(going) == len(live):
            return Step(parents, tokens, emitted)
        self.live = [live[row] for row in going]
        if self.finished:
            return Step(emitted=emitted)
        history.keep(np.array(going, dtype=np.intp))
        return Step([parents[row] for row in going], [tokens[row] for row in going], emitted)

    def result(self) -> GenerationResult:
        """Return what was generated.

        Raises:
            GenerationError: the request failed.
        """
        if self.error is not None:
            raise self.error
        scores = self.scores if self.records_scores else None
        return GenerationResult(self.prompt_length, self.sequences, self.reasons, None, scores, self.logprobs)


def _process(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> list[Turn]:
    """Run the processors of all requests over their rows, in place; return the turns of those that they let go on."""
    going: list[Turn] = []
    for turn in turns:
        decoder = turn.decoder
        with Isolated(turn, steps):
            if decoder.processors:
                decoder.process(logits[turn.row : turn.row + decoder.rows])
            going.append(turn)
    return going


def choose_greedily(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
    """Choose the best token of each sequence of each request."""
    going = _process(turns, logits, steps)
    if not going:
        return
    scores = rows_of(going, logits)
    best = scores.argmax(axis=1).tolist()
    row = 0
    for turn in going:
        decoder = turn.decoder
        assert isinstance(decoder, SequenceDecoder)
        first, row = row, row + decoder.rows
        with Isolated(turn, steps):
            tokens = best[first:row]
            if decoder.records_scores:
                _record_greedy(decoder, scores[first:row], tokens)
            # Before the first step, the prompt's one row stands for all sequences.
            steps[turn.place] = decoder.accept_all(tokens * (len(decoder.live) // len(tokens)))


def _record_greedy(decoder: SequenceDecoder, scores: Scores, tokens: list[int]) -> None:
    normalized = scores.copy()
    with np.errstate(all="ignore"):
        log_softmax(normalized)
    for place, sequence in enumerate(decoder.live):
        row = place if len(tokens) > 1 else 0
        token = tokens[row]
        score = TokenScore(token, float(scores[row, token]), float(normalized[row, token]))
        decoder.scores[sequence].append(score)


class Sampler:
    """Draws the next tokens of all requests that have the same warpers switched on.

    Args:
        active: the warpers, by which requests are grouped.
    """

    def __init__(self, active: tuple[str, ...]) -> None:
        self.active = active

    def __call__(self, turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
        """Draw for all requests at once."""
        going = _process(turns, logits, steps)
        if not going:
            return
        uniforms: list[list[float]] = []
        for turn in going:
            assert isinstance(turn.decoder, SequenceDecoder)
            uniforms.append(turn.decoder.uniforms())
        try:
            draws = _draw_together(going, rows_of(going, logits), uniforms)
        except Exception:  # noqa: BLE001 - whose failure it is shows when each draws alone
            for turn, drawn in zip(going, uniforms, strict=True):
                with Isolated(turn, steps):
                    _hand_out([turn], _draw_together([turn], rows_of([turn], logits), [drawn]), steps)
            return
        _hand_out(going, draws, steps)


@cache
def _sampler(active: tuple[str, ...]) -> Sampler:
    """Return the one sampler of all requests with these warpers."""
    return Sampler(active)


def _draw_together(turns: Sequence[Turn], scores: Scores, uniforms: Sequence[Sequence[float]]) -> Draws:
    """Warp the rows of all requests at once, and draw from them."""
    warpings: list[Warping] = []
    rows: list[int] = []
    for turn, drawn in zip(turns, uniforms, strict=True):
        decoder = turn.decoder
        assert isinstance(decoder, SequenceDecoder)
        first = len(warpings)
        # Before the first step, all sequences are drawn from the prompt's one row.
        rows += [first] * len(drawn) if decoder.rows == 1 else range(first, first + decoder.rows)
        warpings += [decoder.warping] * decoder.rows
    flat = [uniform for drawn in uniforms for uniform in drawn]
    with np.errstate(all="ignore"):
        return draw(warp(scores, warpings), np.array(rows), np.array(flat))


def _hand_out(turns: Sequence[Turn], draws: Draws, steps: list[Step]) -> None:
    tokens = draws.tokens.tolist()
    all_possible = bool(draws.possible.all())
    at = 0
    for turn in turns:
        decoder = turn.decoder
        assert isinstance(decoder, SequenceDecoder)
        end = at + len(decoder.live)
        with Isolated(turn, steps):
            if not all_possible and not draws.possible[at:end].all():
                steps[turn.place] = decoder.fail(NO_CHOICE)
            else:
                if decoder.records_scores:
                    for sequence, place in zip(decoder.live, range(at, end), strict=True):
                        score = TokenScore(tokens[place], float(draws.scores[place]), draws.logprob(place))
                        decoder.scores[sequence].append(score)
                steps[turn.place] = decoder.accept_all(tokens[at:end])
        at = end
