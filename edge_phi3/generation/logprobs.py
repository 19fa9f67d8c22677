"""Log-probabilities of the model's own logits, for requests that ask how sure the model was."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.decoding import Chooser, Isolated, Step, TokenLogprobs, Turn
from edge_phi3.generation.logits import Scores
from edge_phi3.generation.sampling import SequenceDecoder


def watch(decoder: SequenceDecoder, top: int) -> None:
    """Have a decoder record the log-probability of each token that it chooses.

    Args:
        decoder: before its first step.
        top: how many of the likeliest tokens to record beside each chosen one.
    """
    decoder.logprobs = [[] for _ in decoder.live]
    decoder.chooser = _watched(decoder.chooser, top)


class _Watcher:
    """A chooser that also reads the logits, before the one that it stands for changes them."""

    def __init__(self, chooser: Chooser, top: int) -> None:
        self._chooser = chooser
        self._top = top

    def __call__(self, turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
        """Choose, and record how likely the chosen tokens were."""
        read = [logits[turn.row : turn.row + turn.decoder.rows].copy() for turn in turns]
        self._chooser(turns, logits, steps)
        for turn, rows in zip(turns, read, strict=True):
            decoder = turn.decoder
            assert isinstance(decoder, SequenceDecoder)
            with Isolated(turn, steps):
                step = steps[turn.place]
                step.logprobs = _logprobs(rows, [token for _, token in step.emitted], self._top)
                assert decoder.logprobs is not None
                for (sequence, _), logprobs in zip(step.emitted, step.logprobs, strict=True):
                    decoder.logprobs[sequence].append(logprobs)


@cache
def _watched(chooser: Chooser, top: int) -> _Watcher:
    """Return the one watcher of a chooser, so that requests still share calls."""
    return _Watcher(chooser, top)


def _logprobs(rows: Scores, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of the chosen tokens.

    The logits are the model's float32; what is computed from them is float64.

    Args:
        rows: logits, shape (sequences, vocabulary), or one row that all sequences start from.
        tokens: one for each sequence; none when the request failed.
        top: how many of the likeliest tokens to return.
    """
    exact = (rows if len(tokens) == len(rows) else rows[:1]).astype(np.float64)
    with np.errstate(all="ignore"):
        exact -= exact.max(axis=1, keepdims=True)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    best = [_likeliest(row, top) for row in exact]
    places = [place % len(exact) for place in range(len(tokens))]
    return [
        TokenLogprobs(token, float(exact[place, token]), best[place])
        for place, token in zip(places, tokens, strict=True)
    ]


def _likeliest(row: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens; of equal ones those with the lower id."""
    count = min(count, len(row))
    if count == 0:
        return ()
    bound = np.partition(row, len(row) - count)[len(row) - count]
    reached = np.flatnonzero(row >= bound)
    order = reached[np.argsort(-row[reached], kind="stable")][:count]
    return tuple(zip(order.tolist(), row[order].tolist(), strict=True))
