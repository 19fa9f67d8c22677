"""Logits warpers: what reshapes the distribution before a token is drawn, when `do_sample` is true.

Each works on many rows of several requests at once, with a column of settings, shape (rows, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.logits import Candidates, Scores, keep_top, top_candidates

_SLACK: Final = 1e-5
_GENTLE: Final = (1e-3, 1e3)


@dataclass(frozen=True, slots=True)
class Warping:
    """The warpers of one request.

    Attributes:
        active: names of the warpers that are on, in order. Requests with the same names are warped together.
        settings: the value of each.
        keep: tokens that survive in any case.
    """

    active: tuple[str, ...]
    settings: tuple[float, ...]
    keep: int

    @classmethod
    def of(cls, config: GenerationConfig) -> Self:
        """Collect the warpers that a request switches on, in transformers' order."""
        keep = max(2, len(config.eos_token_id) + 1) if config.is_beam_search else 1
        settings: dict[str, float] = {}
        if config.temperature != 1.0:
            settings["temperature"] = config.temperature
        if config.top_k != 0:
            settings["top_k"] = max(min(config.top_k, config.vocab_size), keep)
        if config.top_p < 1.0:
            settings["top_p"] = config.top_p
        return cls(tuple(settings), tuple(settings.values()), keep)


def warp(scores: Scores, warpings: Sequence[Warping]) -> Candidates:
    """Apply the warpers to rows that have the same ones switched on.

    Args:
        scores: shape (rows, vocabulary); may be overwritten.
        warpings: one for each row, all with the same `active`.

    Returns:
        What is left of each row.
    """
    active = warpings[0].active
    columns = {
        name: np.array([warping.settings[at] for warping in warpings])[:, None] for at, name in enumerate(active)
    }
    keep = np.array([warping.keep for warping in warpings], dtype=np.intp)
    temperature = columns.pop("temperature", None)
    top_k = columns.pop("top_k", None)
    if top_k is None:
        if temperature is not None:
            scores /= temperature.astype(np.float32)
        chosen = Candidates(scores)
    else:
        chosen = _warm_top_k(scores, temperature, top_k[:, 0].astype(np.intp))
    for name, column in columns.items():
        _WARPERS[name](chosen, column, keep)
    return chosen


def _warm_top_k(scores: Scores, temperature: NDArray[np.float64] | None, k: NDArray[np.intp]) -> Candidates:
    """Divide by the temperature and keep the top k, dividing only what may be kept."""
    if temperature is None:
        return top_candidates(scores, k)
    if temperature.min() < _GENTLE[0] or temperature.max() > _GENTLE[1]:
        # So large or small a quotient may round scores that are far apart to one value.
        scores /= temperature.astype(np.float32)
        return top_candidates(scores, k)
    chosen = top_candidates(scores, k, slack=_SLACK)
    chosen.scores /= temperature.astype(np.float32)
    keep_top(chosen, k)
    return chosen


def softmax(scores: Scores) -> Scores:
    """Give the softmax of each row."""
    exponentials: Scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    exponentials /= totals(exponentials).astype(np.float32)
    return exponentials


def totals(values: Scores) -> NDArray[np.float64]:
    """Sum each row in float64, shape (rows, 1), so that zeros at its end change no bit of the sum."""
    if values.shape[1] > 4096:
        return np.asarray(values.sum(axis=1, keepdims=True, dtype=np.float64))
    return np.asarray(np.cumsum(values, axis=1, dtype=np.float64)[:, -1:])


def _top_p(candidates: Candidates, mass: NDArray[np.float64], keep: NDArray[np.intp]) -> None:
    """Keep the fewest most likely tokens whose probabilities reach `mass`. Follows ``TopPLogitsWarper``."""
    scores = candidates.scores
    order = np.argsort(scores, axis=1, kind="stable")
    probabilities = np.take_along_axis(softmax(scores), order, axis=1)
    reached = np.cumsum(probabilities, axis=1, dtype=np.float64).astype(np.float32)
    removed = reached <= (1 - mass).astype(np.float32)
    removed &= np.arange(scores.shape[1]) < scores.shape[1] - keep[:, None]
    _remove(scores, order, removed)


def _remove(scores: Scores, order: NDArray[np.intp], removed: NDArray[np.bool_]) -> None:
    mask = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(mask, order, removed, axis=1)
    scores[mask] = -np.inf


_WARPERS: Final = {"top_p": _top_p}
