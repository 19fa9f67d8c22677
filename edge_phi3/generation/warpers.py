"""Logits warpers: what reshapes the distribution before a token is drawn, when `do_sample` is true.

Each works on many rows of several requests at once, with a column of settings, shape (rows, 1). Removed
tokens get the score minus infinity. `keep` counts the tokens of each row that survive in any case, shape
(rows,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.logits import (
    Candidates,
    Rows,
    Scores,
    keep_top,
    kth_highest,
    log_softmax,
    pad_rows,
    running_totals,
    softmax,
    top_candidates,
    totals,
    weights,
)

Settings = NDArray[np.float64]

_SLACK: Final = 1e-5
_MILD: Final = (1e-3, 1e3)
_NUCLEUS: Final = (120, 2000)


@dataclass(frozen=True, slots=True)
class Warping:
    """The warpers of one request.

    Attributes:
        active: names of the warpers that are on, in transformers' order. Rows with the same names are warped
            together.
        settings: the value of each.
        keep: tokens that survive in any case.
    """

    active: tuple[str, ...]
    settings: tuple[float, ...]
    keep: int

    @classmethod
    def of(cls, config: GenerationConfig) -> Self:
        """Collect the warpers that a request switches on."""
        # A beam may end on any end token, and must then still find one that goes on.
        keep = max(2, len(config.eos_token_id) + 1) if config.is_beam_search else 1
        top_k = config.top_k and max(min(config.top_k, config.vocab_size), keep)
        settings: list[tuple[str, float, bool]] = [
            ("temperature", config.temperature, config.temperature != 1),
            ("top_k", top_k, top_k != 0),
            ("top_p", config.top_p, config.top_p < 1),
            ("min_p", config.min_p or 0, config.min_p is not None),
            ("typical_p", config.typical_p, config.typical_p < 1),
            ("epsilon_cutoff", config.epsilon_cutoff, config.epsilon_cutoff > 0),
            ("eta_cutoff", config.eta_cutoff, config.eta_cutoff > 0),
            ("renormalize_logits", 1, config.renormalize_logits),
        ]
        active = [(name, value) for name, value, on in settings if on]
        return cls(tuple(name for name, _ in active), tuple(value for _, value in active), keep)


def warp(scores: Scores, warpings: Sequence[Warping]) -> Candidates:
    """Apply the warpers to rows that have the same ones switched on.

    Args:
        scores: shape (rows, vocabulary); may be overwritten.
        warpings: one for each row, all with the same `active`.

    Returns:
        What is left of each row.
    """
    names = warpings[0].active
    if not names:
        return Candidates(scores)
    columns = dict(zip(names, np.array([warping.settings for warping in warpings]).T[:, :, None], strict=True))
    keep = np.array([warping.keep for warping in warpings], dtype=np.intp)
    temperature, top_k = columns.pop("temperature", None), columns.pop("top_k", None)
    if top_k is not None:
        chosen = _warm_top_k(scores, temperature, top_k[:, 0].astype(np.intp))
    else:
        if temperature is not None:
            scores /= temperature.astype(np.float32)
        top_p = columns.pop("top_p", None)
        chosen = Candidates(scores) if top_p is None else _nucleus(scores, top_p, keep)
    for name, column in columns.items():
        _WARPERS[name](chosen, column, keep)
    return chosen


def _warm_top_k(scores: Scores, temperature: Settings | None, k: Rows) -> Candidates:
    """Divide by the temperature and keep the top k, dividing only what may be kept."""
    if temperature is None:
        return top_candidates(scores, k)
    if temperature.min() < _MILD[0] or temperature.max() > _MILD[1]:
        # So small or large a quotient may round scores that are far apart to the same value.
        scores /= temperature.astype(np.float32)
        return top_candidates(scores, k)
    chosen = top_candidates(scores, k, slack=_SLACK)
    chosen.scores /= temperature.astype(np.float32)
    keep_top(chosen, k)
    return chosen


def _nucleus(scores: Scores, mass: Settings, keep: Rows) -> Candidates:
    """Apply top-p to whole rows. Only the head of the distribution is sorted where that is seen to be enough."""
    size = scores.shape[1]
    found: list[tuple[NDArray[np.int32], Scores]] = []
    for row in range(len(scores)):
        line, share, kept = scores[row : row + 1], mass[row : row + 1], keep[row : row + 1]
        total = totals(weights(line), whole=True)
        if np.isnan(total[0, 0]):
            found.append((np.zeros(1, dtype=np.int32), np.full(1, np.nan, dtype=np.float32)))
            continue
        for count in (*_NUCLEUS, size):
            head = top_candidates(line, np.array([count])) if count < size else Candidates(line.copy())
            outside = (
                np.maximum(total - totals(weights(head.scores), whole=False), 0) if count < size else np.zeros((1, 1))
            )
            if outside[0, 0] / total[0, 0] <= 1 - share[0, 0] and count >= kept[0]:
                break
        _top_p(head, share, kept, outside)
        columns = np.flatnonzero(head.scores[0] > -np.inf)
        found.append((head.token_ids(np.zeros_like(columns), columns), head.scores[0, columns]))
    row_of = np.repeat(np.arange(len(found)), [len(tokens) for tokens, _ in found])
    tokens = np.concatenate([tokens for tokens, _ in found]).astype(np.intp)
    return pad_rows(len(scores), row_of, tokens, np.concatenate([values for _, values in found]))


def _top_p(candidates: Candidates, mass: Settings, keep: Rows, outside: NDArray[np.float64] | float = 0.0) -> None:
    """Keep the fewest most likely tokens whose probabilities reach `mass`. Follows ``TopPLogitsWarper``.

    `outside` is the weight of tokens that are less likely than all candidates, and sure to be removed.
    """
    scores = candidates.scores
    width = scores.shape[1]
    order = np.argsort(scores, axis=1, kind="stable")
    weighed = weights(scores)
    total = totals(weighed, whole=candidates.tokens is None) + outside
    weighed /= total.astype(np.float32)
    reached = running_totals(np.take_along_axis(weighed, order, axis=1)) + outside / total
    removed = reached.astype(np.float32) <= (1 - mass).astype(np.float32)
    removed &= np.arange(width) < width - keep[:, None]
    _remove(scores, order, removed)


def _min_p(candidates: Candidates, fraction: Settings, keep: Rows) -> None:
    """Remove what is less likely than a fraction of the most likely token. Follows ``MinPLogitsWarper``."""
    scores = candidates.scores
    probabilities = softmax(scores, whole=candidates.tokens is None)
    unlikely = probabilities < fraction.astype(np.float32) * probabilities.max(axis=1, keepdims=True)
    if int(keep.max()) == 1:
        scores[unlikely] = -np.inf
        return
    order = np.argsort(-scores, axis=1, kind="stable")
    removed = np.take_along_axis(unlikely, order, axis=1)
    removed &= np.arange(scores.shape[1]) >= keep[:, None]
    _remove(scores, order, removed)


def _typical_p(candidates: Candidates, mass: Settings, keep: Rows) -> None:
    """Keep the tokens whose information is nearest to the entropy. Follows ``TypicalLogitsWarper``.

    Meister et al., Locally Typical Sampling, https://arxiv.org/abs/2202.00666.
    """
    scores = candidates.scores
    width, whole = scores.shape[1], candidates.tokens is None
    normalized = scores.copy()
    log_softmax(normalized, whole=whole)
    distance = np.abs(-normalized - _entropy(normalized, whole=whole))
    order = np.argsort(distance, axis=1, kind="stable")
    nearest = np.take_along_axis(distance, order, axis=1)
    reached = running_totals(np.take_along_axis(softmax(scores, whole=whole), order, axis=1))
    last = (reached.astype(np.float32) < mass.astype(np.float32)).sum(axis=1, keepdims=True)
    removed = nearest > np.take_along_axis(nearest, np.minimum(last, width - 1), axis=1)
    removed &= np.arange(width) >= keep[:, None]
    _remove(scores, order, removed)


def _epsilon(candidates: Candidates, threshold: Settings, keep: Rows) -> None:
    """Remove what is less likely than a threshold. Follows ``EpsilonLogitsWarper``.

    Hewitt et al., Truncation Sampling as Language Model Desmoothing, https://arxiv.org/abs/2210.15191.
    """
    _cut(candidates, softmax(candidates.scores, whole=candidates.tokens is None), threshold.astype(np.float32), keep)


def _eta(candidates: Candidates, epsilon: Settings, keep: Rows) -> None:
    """Remove what is less likely than a threshold that falls with the entropy. Follows ``EtaLogitsWarper``.

    Hewitt et al., Truncation Sampling as Language Model Desmoothing, https://arxiv.org/abs/2210.15191.
    """
    scores = candidates.scores
    whole = candidates.tokens is None
    normalized = scores.copy()
    log_softmax(normalized, whole=whole)
    epsilon = epsilon.astype(np.float32)
    threshold = np.minimum(epsilon, np.sqrt(epsilon) * np.exp(-_entropy(normalized, whole=whole)))
    _cut(candidates, softmax(scores, whole=whole), threshold, keep)


def _cut(candidates: Candidates, probabilities: Scores, threshold: Scores, keep: Rows) -> None:
    scores = candidates.scores
    scores[(probabilities < threshold) & (scores < kth_highest(scores, keep))] = -np.inf


def _entropy(normalized: Scores, *, whole: bool) -> Scores:
    """Give the entropy of each row of log-probabilities, shape (rows, 1)."""
    probabilities = np.exp(normalized)
    information = np.where(probabilities > 0, normalized * probabilities, np.float32(0))
    return -totals(information, whole=whole).astype(np.float32)


def _renormalize(candidates: Candidates, _on: Settings, _keep: Rows) -> None:
    """Turn scores into log-probabilities. Follows ``LogitNormalization``."""
    log_softmax(candidates.scores, whole=candidates.tokens is None)


def _remove(scores: Scores, order: Rows, removed: NDArray[np.bool_]) -> None:
    """Remove columns that are marked in sorted order."""
    mask = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(mask, order, removed, axis=1)
    scores[mask] = -np.inf


_WARPERS: Final[Mapping[str, Callable[[Candidates, Settings, Rows], None]]] = {
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical_p,
    "epsilon_cutoff": _epsilon,
    "eta_cutoff": _eta,
    "renormalize_logits": _renormalize,
}
