"""Greedy decoding and multinomial sampling: sequences that go on one token at a time."""

import secrets
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import (
    NO_CHOICE,
    Chooser,
    Decoder,
    GenerationError,
    GenerationResult,
    Step,
    TokenLogprobs,
    TokenScore,
    Turn,
    fail_alone,
    rows_of,
    token_logprobs,
)
from edge_phi3.generation.drawing import Draws, draw, uniforms
from edge_phi3.generation.logits import Scores, log_softmax
from edge_phi3.generation.stopping import FinishReason, Stopping
from edge_phi3.generation.warpers import Warping, warp

_NONE: Final = -1
"""Stands for a token where none may be chosen."""


class SequenceDecoder(Decoder):
    """Greedy decoding, or sampling of one or several sequences. Follows ``GenerationMixin._sample``.

    `live` are the indices of the sequences that go on. The tokens' `scores` and `logprobs` are None unless recorded.
    """

    def __init__(self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping) -> None:
        super().__init__(config, prompt, stopping)
        count = config.num_return_sequences
        self.live = list(range(count))
        self.scores: list[list[TokenScore]] | None = [[] for _ in self.live] if config.records_scores else None
        self.logprobs: list[list[TokenLogprobs]] | None = None
        self.warping = Warping.of(config)
        self._sequences = [prompt] * count
        self._reasons: list[FinishReason] = ["length"] * count
        self.chooser: Chooser = choose_greedily
        if config.do_sample:
            seed = secrets.randbits(64) if config.seed is None else config.seed
            self._uniforms = [uniforms(seed, sequence) for sequence in self.live]
            self.chooser = _sampler(self.warping.active)
        if config.top_logprobs is not None:
            self.logprobs = [[] for _ in self.live]
            self.chooser = _recorder(self.chooser, config.top_logprobs)

    def uniforms(self) -> list[float]:
        """Draw one number for each live sequence."""
        return [next(self._uniforms[sequence]) for sequence in self.live]

    def accept_all(self, tokens: list[int]) -> Step:
        """Continue all live sequences with a token for each, and let go of those that end."""
        history, stopping, live = self.history, self.stopping, self.live
        parents: Sequence[int] = range(len(live))
        if history.rows == len(live):
            history.append(tokens)
        else:
            # Before the first step, the prompt's one row stands for all sequences.
            parents = [0] * len(live)
            history.extend(np.array(parents), np.array(tokens, dtype=np.int32))
        emitted = list(zip(live, tokens, strict=True))
        bound = stopping.bound(history.length)
        if bound is None and not stopping.strings and stopping.ends.isdisjoint(tokens):
            self.rows = len(live)
            return Step(parents, tokens, emitted)
        going: list[int] = []
        for row, (sequence, token) in enumerate(emitted):
            reason = bound
            if token in stopping.ends:
                reason = "stop"
            elif stopping.is_completed(history.tokens[row]):
                reason = "stop_string"
            if reason is None:
                going.append(row)
            else:
                self._reasons[sequence] = reason
                self._sequences[sequence] = history.tokens[row].copy()
        self.rows = len(going)
        self.finished = not going
        if len(going) == len(live):
            return Step(parents, tokens, emitted)
        self.live = [live[row] for row in going]
        if self.finished:
            return Step(emitted=emitted)
        history.keep(np.array(going, dtype=np.intp))
        return Step([parents[row] for row in going], [tokens[row] for row in going], emitted)

    def _result(self) -> GenerationResult:
        return GenerationResult(self.prompt_length, self._sequences, self._reasons, None, self.scores, self.logprobs)

    def forced(self, row: int, most: int) -> list[int]:  # noqa: ARG002 - what a constraint says of it
        """Return up to so many tokens that are likely to come next in a live sequence, since no other text may."""
        return []


def _process(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> list[Turn]:
    """Run the processors of all requests over their rows, in place; return the turns of those that they let go on."""
    going: list[Turn] = []
    for turn in turns:
        decoder = turn.decoder
        try:
            if decoder.processes:
                decoder.process(logits[turn.row : turn.row + decoder.rows])
            going.append(turn)
        except Exception as error:  # noqa: BLE001 - it is logged
            fail_alone(turn, steps, error)
    return going


def choose_greedily(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
    """Choose the best token of each sequence of each request."""
    if going := _process(turns, logits, steps):
        scores, rows = rows_of(going, logits), _rows_of_sequences(going)
        tokens = scores.argmax(axis=1)[rows].tolist()
        _accept(going, tokens, lambda place: _scored(scores[rows[place]], tokens[place]), steps)


def _scored(scores: Scores, token: int) -> TokenScore:
    normalized = scores[None].copy()
    with np.errstate(all="ignore"):
        log_softmax(normalized)
    return TokenScore(token, float(scores[token]), float(normalized[0, token]))


def _rows_of_sequences(turns: Sequence[Turn]) -> list[int]:
    """Return the row of each live sequence, where the requests' rows lie one after the other."""
    rows: list[int] = []
    first = 0
    for _, decoder, _ in turns:
        assert isinstance(decoder, SequenceDecoder)
        # Before the first step, the prompt's one row stands for all sequences.
        rows += [first] * len(decoder.live) if decoder.rows == 1 else range(first, first + decoder.rows)
        first += decoder.rows
    return rows


@cache
def _sampler(_active: tuple[str, ...]) -> Chooser:
    """Return the one chooser of all requests that have the same warpers switched on: it draws for them together."""
    return partial(_sample)


def _sample(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
    going = _process(turns, logits, steps)
    if not going:
        return
    numbers: list[list[float]] = []
    for turn in going:
        assert isinstance(turn.decoder, SequenceDecoder)
        numbers.append(turn.decoder.uniforms())
    try:
        draws = _draw(going, rows_of(going, logits), numbers)
    except Exception:  # noqa: BLE001 - whose failure it is shows when each draws alone
        for turn, drawn in zip(going, numbers, strict=True):
            try:
                _accept_draws([turn], _draw([turn], rows_of([turn], logits), [drawn]), steps)
            except Exception as error:  # noqa: BLE001 - it is logged
                fail_alone(turn, steps, error)
        return
    _accept_draws(going, draws, steps)


def _draw(turns: Sequence[Turn], scores: Scores, numbers: Sequence[list[float]]) -> Draws:
    """Warp the rows of all requests at once, and draw from them."""
    warpings: list[Warping] = []
    for _, decoder, _ in turns:
        assert isinstance(decoder, SequenceDecoder)
        warpings += [decoder.warping] * decoder.rows
    with np.errstate(all="ignore"):
        return draw(warp(scores, warpings), np.array(_rows_of_sequences(turns)), np.concatenate(numbers))


def _accept_draws(turns: Sequence[Turn], draws: Draws, steps: list[Step]) -> None:
    tokens = np.where(draws.possible, draws.tokens, _NONE).tolist()
    _accept(turns, tokens, lambda at: TokenScore(tokens[at], float(draws.scores[at]), draws.logprob(at)), steps)


def _accept(turns: Sequence[Turn], tokens: list[int], score: Callable[[int], TokenScore], steps: list[Step]) -> None:
    """Continue all sequences of each request with a token for each; `score` returns that of the token at a place."""
    end = 0
    for turn in turns:
        decoder = turn.decoder
        assert isinstance(decoder, SequenceDecoder)
        begin, end = end, end + len(decoder.live)
        chosen = tokens[begin:end]
        try:
            if _NONE in chosen:
                steps[turn.place] = decoder.fail(GenerationError(NO_CHOICE))
                continue
            if decoder.scores is not None:
                for sequence, place in zip(decoder.live, range(begin, end), strict=True):
                    decoder.scores[sequence].append(score(place))
            steps[turn.place] = decoder.accept_all(chosen)
        except Exception as error:  # noqa: BLE001 - it is logged
            fail_alone(turn, steps, error)


@cache
def _recorder(chooser: Chooser, top: int) -> Chooser:
    """Return a chooser that also records how likely the model itself held the tokens, and so many of the likeliest.

    There is one for each chooser, so that requests still share calls. It reads the logits before they are changed.
    """

    def choose(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
        read = [logits[turn.row : turn.row + turn.decoder.rows].copy() for turn in turns]
        chooser(turns, logits, steps)
        for turn, rows in zip(turns, read, strict=True):
            decoder = turn.decoder
            assert isinstance(decoder, SequenceDecoder)
            try:
                step = steps[turn.place]
                step.logprobs = token_logprobs(rows, [token for _, token in step.emitted], top)
                assert decoder.logprobs is not None
                for (sequence, _), logprobs in zip(step.emitted, step.logprobs, strict=True):
                    decoder.logprobs[sequence].append(logprobs)
            except Exception as error:  # noqa: BLE001 - it is logged
                fail_alone(turn, steps, error)

    return choose
