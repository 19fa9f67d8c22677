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
    MILD,
    SLACK,
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
)

Settings = NDArray[np.float64]

_NARROWINGS: Final = 12
_BINS: Final = 2048


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
        scores: shape (rows, vocabulary).
        warpings: one for each row, all with the same `active`.

    Returns:
        What is left of each row.
    """
    names = warpings[0].active
    if not names:
        return Candidates(scores)
    settings = [warping.settings for warping in warpings]
    keep = [warping.keep for warping in warpings]
    first = 0
    if "top_k" in names:
        first = names.index("top_k") + 1
        temperature = None if first == 1 else np.array([values[0] for values in settings])[:, None]
        chosen = _warm_top_k(scores, temperature, [int(values[first - 1]) for values in settings])
    else:
        if names[0] == "temperature":
            scores = scores / np.array([values[0] for values in settings], dtype=np.float32)[:, None]
            first = 1
        if names[first:] and names[first] == "top_p":
            chosen = _nucleus(scores, [values[first] for values in settings], keep)
            first += 1
        else:
            chosen = Candidates(scores if first else scores.copy())
    for at in range(first, len(names)):
        column = np.array([values[at] for values in settings])[:, None]
        if chosen.tokens is not None:
            _WARPERS[names[at]](chosen, column, keep)
            continue
        # Whole rows one by one, so that what is made on the way stays in the processor's cache.
        for row in range(len(scores)):
            line = Candidates(chosen.scores[row : row + 1])
            _WARPERS[names[at]](line, column[row : row + 1], keep[row : row + 1])
    return chosen


def _warm_top_k(scores: Scores, temperature: Settings | None, k: Sequence[int]) -> Candidates:
    """Divide by the temperature and keep the top k, dividing only what may be kept."""
    if temperature is None:
        return top_candidates(scores, k)
    if temperature.min() < MILD[0] or temperature.max() > MILD[1]:
        # So small or large a quotient may round scores that are far apart to the same value.
        scaled: Scores = np.divide(scores, temperature, dtype=np.float32)
        return top_candidates(scaled, k)
    chosen = top_candidates(scores, k, slack=SLACK)
    chosen.scores /= temperature.astype(np.float32)
    keep_top(chosen, k)
    return chosen


def _nucleus(scores: Scores, mass: Sequence[float], keep: Sequence[int]) -> Candidates:
    """Apply top-p to whole rows, and cut them down to what is left. Follows ``TopPLogitsWarper``."""
    tokens = [_nucleus_of(line, share, kept) for line, share, kept in zip(scores, mass, keep, strict=True)]
    row = np.repeat(np.arange(len(tokens)), [len(each) for each in tokens])
    token = np.concatenate(tokens)
    return pad_rows(len(scores), row, token, scores[row, token])


def _nucleus_of(line: Scores, mass: float, keep: int) -> Rows:
    """Give the tokens of one row that top-p keeps; all that are NaN when there are such."""
    highest = line.max()
    weighed = line - highest
    np.exp(weighed, out=weighed)
    total = float(weighed.sum())
    if np.isnan(total):
        return np.flatnonzero(np.isnan(line))
    # Tokens that weigh less than an equal share of what may be removed are surely removed; only the rest is sorted.
    budget = (1 - mass) * total
    tokens: Rows | None = None
    so_far = total
    for _ in range(_NARROWINGS):
        left = np.flatnonzero(weighed > budget / len(weighed))
        if len(left) < keep or len(left) > 0.8 * len(weighed):
            break
        weighed = weighed[left]
        tokens = left if tokens is None else tokens[left]
        budget -= max(so_far - float(weighed.sum()), 0)
        so_far = float(weighed.sum())
    if tokens is None:
        tokens = np.arange(len(line))
    scores = line[tokens]
    ascending = np.sort(scores)
    probabilities = np.exp(ascending - highest) / np.float32(total)
    reached = (1 - mass - budget / total + np.cumsum(probabilities, dtype=np.float64)).astype(np.float32)
    removed = min(int(np.count_nonzero(reached <= np.float32(1 - mass))), len(tokens) - keep)
    if removed <= 0:
        return tokens
    lowest = ascending[removed]
    kept = scores >= lowest
    # Of equal scores the first are removed first.
    ties = np.flatnonzero(scores == lowest)
    kept[ties[: removed - int(np.count_nonzero(scores < lowest))]] = False
    nucleus: Rows = tokens[kept]
    return nucleus


def _top_p(candidates: Candidates, mass: Settings, keep: Sequence[int]) -> None:
    """Keep the fewest most likely tokens whose probabilities reach `mass`. Follows ``TopPLogitsWarper``."""
    scores = candidates.scores
    width = scores.shape[1]
    order = np.argsort(scores, axis=1, kind="stable")
    probabilities = softmax(scores, whole=False)
    reached = running_totals(np.take_along_axis(probabilities, order, axis=1))
    removed = reached.astype(np.float32) <= (1 - mass).astype(np.float32)
    removed &= np.arange(width) < width - np.array(keep)[:, None]
    mask = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(mask, order, removed, axis=1)
    scores[mask] = -np.inf


def _min_p(candidates: Candidates, fraction: Settings, keep: Sequence[int]) -> None:
    """Remove what is less likely than a fraction of the most likely token. Follows ``MinPLogitsWarper``."""
    scores = candidates.scores
    probabilities = softmax(scores, whole=candidates.tokens is None)
    unlikely = probabilities < fraction.astype(np.float32) * probabilities.max(axis=1, keepdims=True)
    if max(keep) > 1:
        unlikely &= ~_best(scores, keep)
    scores[unlikely] = -np.inf


def _typical_p(candidates: Candidates, mass: Settings, keep: Sequence[int]) -> None:
    """Keep the tokens whose information is nearest to the entropy. Follows ``TypicalLogitsWarper``.

    Meister et al., Locally Typical Sampling, https://arxiv.org/abs/2202.00666.
    """
    scores, whole = candidates.scores, candidates.tokens is None
    normalized = scores.copy()
    log_softmax(normalized, whole=whole)
    distance = np.abs(-normalized - _entropy(normalized, whole=whole))
    probabilities = softmax(scores, whole=whole)
    if whole:
        farthest = np.array([[_typical_distance(distance[0], probabilities[0], float(mass[0, 0]))]])
    else:
        order = np.argsort(distance, axis=1, kind="stable")
        reached = running_totals(np.take_along_axis(probabilities, order, axis=1))
        last = (reached.astype(np.float32) < mass.astype(np.float32)).sum(axis=1, keepdims=True)
        last = np.take_along_axis(order, np.minimum(last, scores.shape[1] - 1), axis=1)
        farthest = np.take_along_axis(distance, last, axis=1)
    far = distance > farthest
    if max(keep) > 1:
        far &= ~_best(-distance, keep)
    scores[far] = -np.inf


def _typical_distance(distance: Scores, probabilities: Scores, mass: float) -> float:
    """Find the distance within which the nearest tokens of one row reach a probability mass.

    Args:
        distance: of each token's information from the entropy, shape (vocabulary,).
        probabilities: shape (vocabulary,).
        mass: what to reach.
    """
    limit = np.float32(mass)
    finite = distance[distance < np.inf]
    if len(finite) == 0:
        return np.nan
    # Only the tokens of one bin are sorted: that in which the mass is reached.
    bins = np.minimum(distance * (_BINS / max(float(finite.max()), 1e-30)), _BINS).astype(np.intp)
    reached = np.cumsum(np.bincount(bins, weights=probabilities, minlength=_BINS + 1))
    first = int(np.count_nonzero(reached.astype(np.float32) < limit))
    inside = np.flatnonzero(bins >= first) if first >= _BINS else np.flatnonzero((bins == first) | (bins == first + 1))
    inside = inside[np.argsort(distance[inside], kind="stable")]
    before = reached[first - 1] if first else 0.0
    last = np.count_nonzero((before + np.cumsum(probabilities[inside], dtype=np.float64)).astype(np.float32) < limit)
    if len(inside) == 0 or (last == len(inside) and first < _BINS):
        # The tokens that the sums disagree on weigh next to nothing, but they are kept or not as sorting all would.
        inside = np.argsort(distance, kind="stable")
        last = np.count_nonzero(np.cumsum(probabilities[inside], dtype=np.float64).astype(np.float32) < limit)
    return float(distance[inside[min(int(last), len(inside) - 1)]])


def _epsilon(candidates: Candidates, threshold: Settings, keep: Sequence[int]) -> None:
    """Remove what is less likely than a threshold. Follows ``EpsilonLogitsWarper``.

    Hewitt et al., Truncation Sampling as Language Model Desmoothing, https://arxiv.org/abs/2210.15191.
    """
    _cut(candidates, softmax(candidates.scores, whole=candidates.tokens is None), threshold.astype(np.float32), keep)


def _eta(candidates: Candidates, epsilon: Settings, keep: Sequence[int]) -> None:
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


def _cut(candidates: Candidates, probabilities: Scores, threshold: Scores, keep: Sequence[int]) -> None:
    scores = candidates.scores
    scores[(probabilities < threshold) & (scores < kth_highest(scores, keep))] = -np.inf


def _entropy(normalized: Scores, *, whole: bool) -> Scores:
    """Give the entropy of each row of log-probabilities, shape (rows, 1)."""
    probabilities = np.exp(normalized)
    information = np.where(probabilities > 0, normalized * probabilities, np.float32(0))
    return -totals(information, whole=whole).astype(np.float32)


def _renormalize(candidates: Candidates, _on: Settings, _keep: Sequence[int]) -> None:
    """Turn scores into log-probabilities. Follows ``LogitNormalization``."""
    log_softmax(candidates.scores, whole=candidates.tokens is None)


def _best(scores: Scores, keep: Sequence[int]) -> NDArray[np.bool_]:
    """Mark the highest scores of each row, as many as `keep` says, the first of equal ones first."""
    best = scores >= kth_highest(scores, keep)
    for row in np.flatnonzero(best.sum(axis=1) > np.array(keep)).tolist():
        columns = np.flatnonzero(best[row])
        surplus = np.argsort(-scores[row, columns], kind="stable")[keep[row] :]
        best[row, columns[surplus]] = False
    return best


_WARPERS: Final[Mapping[str, Callable[[Candidates, Settings, Sequence[int]], None]]] = {
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical_p,
    "epsilon_cutoff": _epsilon,
    "eta_cutoff": _eta,
    "renormalize_logits": _renormalize,
}
