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
    Step,
    TokenLogprobs,
    TokenScore,
    Turn,
    rows_of,
)
from edge_phi3.generation.drawing import Draws, draw
from edge_phi3.generation.history import TokenHistory
from edge_phi3.generation.logits import Scores, log_softmax
from edge_phi3.generation.processors import build_processors
from edge_phi3.generation.randomness import Uniforms, fresh_seed
from edge_phi3.generation.stopping import Stopping
from edge_phi3.generation.top_k import draw_from_top_k
from edge_phi3.generation.warpers import Warping, warp

_SAME_ROW: Final = (0,)
NO_CHOICE: Final = (
    "The scores leave no token to sample: they hold NaN or infinity (see `remove_invalid_values`), or every token is"
    " banned (see `suppress_tokens`, `bad_words_ids`, `sequence_bias`, `no_repeat_ngram_size`)."
)


class SequenceDecoder(Decoder):
    """Greedy decoding, or sampling of one or several sequences. Follows ``GenerationMixin._sample``."""

    __slots__ = (
        "_live",
        "_stopping",
        "_uniforms",
        "logprobs",
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
        self.logprobs: list[list[TokenLogprobs]] | None = None
        self.sequences: list[NDArray[np.int32]] = [NO_TOKENS] * count
        self.reasons: list[FinishReason] = ["length"] * count
        self.warping = Warping.of(config)
        self.simple = count == 1 and not stopping.reads_text and config.max_time is None
        self._live = list(range(count))
        self._stopping = stopping
        self._uniforms: list[Uniforms] = []
        self.chooser: Chooser = choose_greedily
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

    def uniform(self) -> float:
        """Draw one number for the only sequence of a simple request."""
        return self._uniforms[0].next()

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        return self._stopping.ends

    @property
    def room(self) -> int:
        """How many tokens may still come."""
        return self._stopping.total_length - self.history.length

    def accept(self, token: int) -> Step:
        """Continue the only sequence of a simple request."""
        self.accept_run((token,))
        emitted = ((0, token),)
        return Step(emitted=emitted) if self.finished else Step(_SAME_ROW, (token,), self._live, emitted)

    def accept_run(self, tokens: Sequence[int]) -> None:
        """Continue the only sequence of a simple request by several tokens, of which only the last may end it."""
        history = self.history
        history.append(tokens)
        if tokens[-1] in self._stopping.ends:
            self.reasons[0] = "stop"
        elif self.room > 0:
            return
        self.sequences[0] = history.tokens[0].copy()
        self._live = []
        self.rows = 0
        self.finished = True

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
        return Step(parents.tolist(), tokens.tolist(), self._live, emitted)

    def result(self) -> GenerationResult:
        """Give what was generated.

        Raises:
            GenerationError: the request failed.
        """
        if self.error is not None:
            raise self.error
        scores = self.scores if self.records_scores else None
        return GenerationResult(self.prompt_length, self.sequences, self.reasons, None, scores, self.logprobs)


def _processed_rows(turns: Sequence[Turn], logits: Scores) -> Scores:
    for turn in turns:
        if turn.decoder.processors:
            turn.decoder.process(logits[turn.row : turn.row + turn.decoder.rows])
    return rows_of(turns, logits)


def choose_greedily(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
    """Choose the best token of each sequence of each request."""
    scores = _processed_rows(turns, logits)
    best = scores.argmax(axis=1)
    listed = best.tolist()
    row = 0
    for turn in turns:
        decoder = turn.decoder
        assert isinstance(decoder, SequenceDecoder)
        end = row + decoder.rows
        if decoder.records_scores:
            _record_greedy(decoder, scores[row:end], listed[row:end])
        if decoder.simple:
            steps[turn.place] = decoder.accept(listed[row])
        else:
            chosen = best[row:end].astype(np.int32)
            # Before the first step, the prompt's one row stands for all sequences.
            steps[turn.place] = decoder.accept_all(chosen.repeat(len(decoder.live) // len(chosen)))
        row = end


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
        active: the warpers.
    """

    def __init__(self, active: tuple[str, ...]) -> None:
        self._top_k_alone = active in {("top_k",), ("temperature", "top_k")}

    def __call__(self, turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
        """Draw for all requests at once."""
        scores = _processed_rows(turns, logits)
        decoders: list[SequenceDecoder] = []
        for turn in turns:
            assert isinstance(turn.decoder, SequenceDecoder)
            decoders.append(turn.decoder)
        uniforms = [decoder.uniforms() for decoder in decoders]
        if not all(decoder.simple and not decoder.records_scores for decoder in decoders):
            _hand_out(turns, _draw_together(turns, scores, uniforms), steps)
            return
        tokens = self.choose(scores, [decoder.warping for decoder in decoders], [drawn[0] for drawn in uniforms])
        for turn, decoder, token in zip(turns, decoders, tokens, strict=True):
            steps[turn.place] = decoder.fail(NO_CHOICE) if token < 0 else decoder.accept(token)

    def choose(self, scores: Scores, warpings: Sequence[Warping], uniforms: Sequence[float]) -> list[int]:
        """Draw one token for each row.

        Args:
            scores: shape (rows, vocabulary); may be overwritten.
            warpings: one for each row, with this sampler's warpers.
            uniforms: a number in [0, 1) for each row.

        Returns:
            The tokens; -1 where a row leaves none to choose.
        """
        if not self._top_k_alone:
            return _draw_each(scores, warpings, uniforms)
        tokens: list[int] = []
        for row, warping in enumerate(warpings):
            *temperature, k = warping.settings
            token = draw_from_top_k(scores[row], temperature[0] if temperature else None, int(k), uniforms[row])
            tokens += _draw_each(scores[row : row + 1], [warping], [uniforms[row]]) if token is None else [token]
        return tokens


@cache
def _sampler(active: tuple[str, ...]) -> Sampler:
    """Give the one sampler of all requests with these warpers."""
    return Sampler(active)


def _draw_each(scores: Scores, warpings: Sequence[Warping], uniforms: Sequence[float]) -> list[int]:
    """Warp all rows at once, and draw one token from each; -1 where that is impossible."""
    with np.errstate(all="ignore"):
        draws = draw(warp(scores, warpings), np.arange(len(warpings)), np.array(uniforms))
    tokens: list[int] = np.where(draws.possible, draws.tokens, -1).tolist()
    return tokens


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
    tokens = draws.tokens
    listed = tokens.tolist()
    all_possible = bool(draws.possible.all())
    at = 0
    for turn in turns:
        decoder = turn.decoder
        assert isinstance(decoder, SequenceDecoder)
        end = at + len(decoder.live)
        if not all_possible and not draws.possible[at:end].all():
            steps[turn.place] = decoder.fail(NO_CHOICE)
        else:
            if decoder.records_scores:
                for sequence, place in zip(decoder.live, range(at, end), strict=True):
                    score, logprob = float(draws.scores[place]), float(draws.logprobs[place])
                    decoder.scores[sequence].append(TokenScore(listed[place], score, logprob))
            steps[turn.place] = decoder.accept_all(tokens[at:end])
        at = end
