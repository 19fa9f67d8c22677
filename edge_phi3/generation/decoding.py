"""One face for all decoding modes: what the engine holds per request, and calls once per step."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_phi3.errors import EdgePhi3Error, InternalError
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.logits import Scores
from edge_phi3.generation.processors import build_processors
from edge_phi3.generation.stopping import FinishReason, Stopping

logger = logging.getLogger(__name__)

NO_CHOICE: Final = (
    "The scores leave no token to choose: they hold NaN or infinity (see `remove_invalid_values`), or every token is"
    " banned (see `suppress_tokens`, `bad_words_ids`, `sequence_bias`, `no_repeat_ngram_size`)."
)


class GenerationError(EdgePhi3Error):
    """A request's scores left no token to choose: they held NaN or infinity, or all were banned."""


class TokenLogprobs(NamedTuple):
    """How likely the model itself held a chosen token, and which tokens it held likeliest at its place.

    Log-probabilities are the log-softmax of the model's logits, before processors and warpers; `top` has pairs of a
    token and its own, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenScore(NamedTuple):
    """The processed score of one chosen token, and the log-softmax at it: in beam modes the transition score, twice."""

    token_id: int
    score: float
    logprob: float


@dataclass(slots=True)
class Step:
    """What one step asks of the engine, and what it may already send on.

    Attributes:
        parents: the next step wants as many rows of logits; row i continues row ``parents[i]`` of this step with
            ``tokens[i]``. Empty when the request is finished.
        emitted: (sequence index, token) for every returned sequence that got a token, those that ended
            included. Always empty in beam modes, whose sequences are known only at the end.
        logprobs: one for each of `emitted` where the request wants them, else empty.
    """

    parents: Sequence[int] = ()
    tokens: Sequence[int] = ()
    emitted: Sequence[tuple[int, int]] = ()
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(slots=True)
class GenerationResult:
    """What a request generated. What was not requested is None, as are beam scores outside beam modes.

    Attributes:
        sequences: token ids of each returned sequence, prompt included, without padding.
        finish_reasons: why each ended: "stop" (a token of ``eos_token_id``), "stop_string", "length" or "time".
        scores: for each sequence, the scores of its generated tokens. In beam modes, the end token that transformers
            appends to beams which a stop string or ``max_time`` cut off has none.
    """

    prompt_length: int
    sequences: list[NDArray[np.int32]] = field(default_factory=list)
    finish_reasons: list[FinishReason] = field(default_factory=list)
    sequences_scores: list[float] | None = None
    scores: list[list[TokenScore]] | None = None
    logprobs: list[list[TokenLogprobs]] | None = None


_UNDECIDED: Final = Step()


class Turn(NamedTuple):
    """One request in one call of `advance`: its index among the decoders of the call, and its first row of logits."""

    place: int
    decoder: Decoder
    row: int


Chooser = Callable[[Sequence[Turn], Scores, list[Step]], None]
"""A way of choosing tokens: chooses for all rows of the given requests, and puts each request's step into the list.

All requests that choose in the same way share one, and are grouped by it. An exception that one request's parameters
cause ends that request alone: see `fail_alone`.
"""

_GROWTH: Final = 128
"""Tokens by which a `TokenHistory` grows at least."""


class TokenHistory:
    """Token ids of the rows of one request: the prompt, then what was generated. All rows are equally long.

    They lie in one array that grows in blocks, so that a step costs one assignment, and reordering (beams, ended rows)
    one gather. `last` is the newest token of each row.
    """

    def __init__(self, prompt: NDArray[np.int32], rows: int = 1) -> None:
        self.length = len(prompt)
        self.rows = rows
        self.last: list[int] = [int(prompt[-1])] * rows
        self._buffer = np.empty((rows, self.length + _GROWTH), dtype=np.int32)
        self._buffer[:, : self.length] = prompt

    @property
    def tokens(self) -> NDArray[np.int32]:
        """A view of all rows, shape (rows, length). It is valid until the next change."""
        return self._buffer[: self.rows, : self.length]

    def extend(self, parents: NDArray[np.intp], tokens: NDArray[np.int32]) -> None:
        """Make new rows: row i continues what was row ``parents[i]`` before with ``tokens[i]``; both of shape (n,)."""
        rows = len(parents)
        # Advanced indexing copies before the assignment, so the rows may overlap.
        reordered = self._buffer[parents, : self.length]
        if rows > len(self._buffer):
            self._buffer = np.empty((rows, self._buffer.shape[1]), dtype=np.int32)
        self._buffer[:rows, : self.length] = reordered
        self.rows = rows
        self.append(tokens.tolist())

    def append(self, tokens: list[int]) -> None:
        """Continue each row in place with a token for each."""
        capacity = self._buffer.shape[1]
        if self.length == capacity:
            grown = np.empty((len(self._buffer), capacity + max(_GROWTH, capacity)), dtype=np.int32)
            grown[: self.rows, :capacity] = self.tokens
            self._buffer = grown
        if self.rows == 1:
            self._buffer[0, self.length] = tokens[0]
        else:
            self._buffer[: self.rows, self.length] = tokens
        self.length += 1
        self.last = tokens

    def keep(self, rows: NDArray[np.intp]) -> None:
        """Let go of all rows but the given ones."""
        self._buffer[: len(rows), : self.length] = self._buffer[rows, : self.length]
        self.rows = len(rows)
        self.last = [self.last[row] for row in rows.tolist()]


class Decoder(ABC):
    """One running request.

    Attributes:
        rows: rows of logits that the next step wants: 1 before the first step (the prompt's last position),
            then one for each live sequence.
        finished: whether no further step is wanted.
        error: why the request failed, if it did.
        processes: whether `process` does anything.
        chooser: how tokens are chosen. Decoders with the same chooser are served together.
    """

    chooser: Chooser

    def __init__(
        self, config: GenerationConfig, prompt: NDArray[np.int32], stopping: Stopping, *, beams: int = 1
    ) -> None:
        self.rows = 1
        self.finished = False
        self.error: EdgePhi3Error | None = None
        self.prompt_length = len(prompt)
        self.processors = build_processors(config, prompt)
        self.processes = bool(self.processors)
        self.history = TokenHistory(prompt, rows=beams)
        self.stopping = stopping

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Do what the next step needs and does not need its logits for."""

    def process(self, scores: Scores) -> None:
        """Run the logits processors over this request's rows, in place."""
        tokens = self.history.tokens
        with np.errstate(all="ignore"):
            for processor in self.processors:
                processor(tokens, scores)

    def row_tokens(self) -> NDArray[np.int32]:
        """Return the tokens of each row that wants logits, shape ``(rows, length)``, valid until the next step."""
        return self.history.tokens

    def last_tokens(self) -> list[int]:
        """Return the newest token of each row that wants logits."""
        return self.history.last

    def fail(self, error: EdgePhi3Error) -> Step:
        """End the request with an error, without touching those beside it."""
        self.error = error
        self.finished = True
        self.rows = 0
        return Step()

    def result(self) -> GenerationResult:
        """Return what was generated; raise `error` if the request failed."""
        if self.error is not None:
            raise self.error
        return self._result()

    @abstractmethod
    def _result(self) -> GenerationResult: ...


def fail_alone(turn: Turn, steps: list[Step], error: Exception) -> None:
    """End the request of one turn for an exception that it has caused; those beside it go on."""
    if not isinstance(error, GenerationError):
        logger.error("A request's tokens cannot be chosen.", exc_info=error)
        error = InternalError()
    steps[turn.place] = turn.decoder.fail(error)


def advance(decoders: Sequence[Decoder], logits: Scores) -> list[Step]:
    """Choose the next tokens of many unfinished requests from one array of logits; return a step for each.

    The logits, shape (sum of ``decoder.rows``, vocabulary), lie in the order of the decoders, and may be overwritten.
    A request whose scores allow no choice fails alone: see `Decoder.error`. `ValueError`: there are too few rows, or
    too many.
    """
    groups: dict[Chooser, list[Turn]] = {}
    row = 0
    for place, decoder in enumerate(decoders):
        group = groups.get(decoder.chooser)
        if group is None:
            groups[decoder.chooser] = group = []
        group.append(Turn(place, decoder, row))
        row += decoder.rows
    if row != len(logits):
        raise ValueError(f"The decoders want {row} rows of logits, but got {len(logits)}.")
    steps = [_UNDECIDED] * len(decoders)
    for chooser, turns in groups.items():
        chooser(turns, logits, steps)
    return steps


def rows_of(turns: Sequence[Turn], logits: Scores) -> Scores:
    """Return the rows of the given requests: a view where they lie side by side, else a copy."""
    first, last = turns[0], turns[-1]
    end = last.row + last.decoder.rows
    wanted = sum([turn.decoder.rows for turn in turns])
    if end - first.row == wanted:
        return logits[first.row : end]
    return np.concatenate([logits[turn.row : turn.row + turn.decoder.rows] for turn in turns])


def token_logprobs(rows: Scores, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of tokens, before processors, and of so many of the likeliest at the place of each.

    `rows` are logits, shape (tokens, vocabulary), or one row for all tokens. They are the model's float32; what is
    computed from them is float64, one row at a time.
    """
    found: list[TokenLogprobs] = []
    for place, token in enumerate(tokens):
        if place < len(rows):
            exact = rows[place].astype(np.float64)
            with np.errstate(all="ignore"):
                exact -= exact.max()
                exact -= np.log(np.exp(exact).sum())
            best = _likeliest(exact, top)
        found.append(TokenLogprobs(token, float(exact[token]), best))
    return found


def _likeliest(row: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens; of equal ones those with the lower id."""
    count = min(count, len(row))
    if count == 0:
        return ()
    bound = row.max() if count == 1 else np.partition(row, len(row) - count)[len(row) - count]
    reached = np.flatnonzero(row >= bound)
    order = reached[np.argsort(-row[reached], kind="stable")][:count]
    return tuple(zip(order.tolist(), row[order].tolist(), strict=True))
