"""Logits warpers: what reshapes the distribution before a token is drawn, when `do_sample` is true.

Each works on many rows of several requests at once, with a column of settings, shape (rows, 1). Removed tokens get the
score minus infinity. `keep` counts the tokens of each row that survive in any case, shape (rows,).
"""

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

_OFF: Final[Mapping[str, float | None]] = {
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": None,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "renormalize_logits": False,
}
"""The value that switches each warper off, in transformers' order."""


@dataclass(frozen=True, slots=True)
class Warping:
    """The warpers of one request: the names of those that are on, in transformers' order, and the value of each."""

    active: tuple[str, ...]
    settings: tuple[float, ...]
    keep: int

    @classmethod
    def of(cls, config: GenerationConfig) -> Self:
        """Collect the warpers that a request switches on."""
        # A beam may end on any end token, and must then still find one that goes on.
        keep = max(2, len(config.eos_token_id) + 1) if config.is_beam_search else 1
        top_k = config.top_k and max(min(config.top_k, config.vocab_size), keep)
        values = {name: getattr(config, name) for name in _OFF} | {"top_k": top_k}
        active = tuple(name for name, value in values.items() if value != _OFF[name])
        return cls(active, tuple(values[name] for name in active), keep)


def warp(scores: Scores, warpings: Sequence[Warping]) -> Candidates:
    """Apply the warpers to rows of scores, shape (rows, vocabulary), and return what is left.

    There is a warping for each row, all with the same `active`.
    """
    names = warpings[0].active
    if not names:
        return Candidates(scores)
    columns = [np.array(values)[:, None] for values in zip(*(warping.settings for warping in warpings), strict=True)]
    keep = [warping.keep for warping in warpings]
    if names[0] == "temperature":
        temperature: Scores = columns[0].astype(np.float32)
        names, columns = names[1:], columns[1:]
        chosen = Candidates(scores / temperature)
    else:
        chosen = Candidates(scores if names[0] in ("top_k", "top_p") else scores.copy())
    for name, column in zip(names, columns, strict=True):
        if name == "top_k":
            chosen = top_candidates(chosen.scores, column.ravel().astype(np.intp).tolist())
        elif chosen.tokens is not None:
            _WARPERS[name](chosen, column, keep)
        elif name == "top_p":
            chosen, tails = _heads(chosen.scores, column, keep)
            _top_p(chosen, column, keep, tails)
        else:
            # Whole rows one by one, so that what is made on the way stays in the processor's cache.
            for row in range(len(scores)):
                line = Candidates(chosen.scores[row : row + 1])
                _WARPERS[name](line, column[row : row + 1], keep[row : row + 1])
    return chosen


def _heads(scores: Scores, mass: Settings, keep: Sequence[int]) -> tuple[Candidates, Settings]:
    """Cut whole rows down to the tokens that top-p may keep; return the weights of the others in units of the highest.

    What weighs less than an equal share of what may still be removed is surely removed, and need not be sorted.
    """
    heads: list[Rows] = []
    tails = np.zeros((len(scores), 1))
    for row, line in enumerate(scores):
        weighed = line - line.max()
        np.exp(weighed, out=weighed)
        head, total = np.arange(len(line)), float(weighed.sum())
        removable, tail = (1 - float(mass[row, 0])) * total, 0.0
        narrower = np.flatnonzero(weighed > removable / len(head))
        while keep[row] <= len(narrower) <= 0.8 * len(head):
            head, weighed = head[narrower], weighed[narrower]
            tail = max(total - float(weighed.sum()), 0.0)
            narrower = np.flatnonzero(weighed > (removable - tail) / len(head))
        tails[row] = tail
        heads.append(head)
    row_of = np.repeat(np.arange(len(heads)), [len(head) for head in heads])
    values = np.concatenate([line[head] for line, head in zip(scores, heads, strict=True)])
    return pad_rows(len(scores), row_of, np.concatenate(heads), values), tails


def _top_p(candidates: Candidates, mass: Settings, keep: Sequence[int], tails: Settings | float = 0.0) -> None:
    """Keep the fewest most likely tokens whose probabilities reach `mass`. Follows ``TopPLogitsWarper``.

    `tails` weighs with the candidates, and is removed already; it is in units of the highest.
    """
    scores = candidates.scores
    ascending = np.sort(scores, axis=1)
    reached = tails + running_totals(weights(ascending))
    reached /= reached[:, -1:]
    count = (reached.astype(np.float32) <= (1 - mass).astype(np.float32)).sum(axis=1)
    count = np.minimum(count, np.maximum(scores.shape[1] - np.array(keep), 0))
    lowest = np.take_along_axis(ascending, count[:, None], axis=1)
    removed = scores < lowest
    surplus = count - removed.sum(axis=1)
    for row in np.flatnonzero(surplus).tolist():
        # Of equal scores the first are removed first.
        removed[row, np.flatnonzero(scores[row] == lowest[row])[: surplus[row]]] = True
    scores[removed] = -np.inf


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
    entropy = _entropy(normalized, whole=whole)
    distance = np.abs(-normalized - entropy)
    probabilities = softmax(scores, whole=whole)
    near = distance
    if whole and 2 * entropy[0, 0] < np.log(2 * scores.shape[1] / (1 - mass[0, 0])):
        # What is less likely than half an equal share of what may be removed is farther away than all others.
        likely = np.flatnonzero(probabilities[0] > float(1 - mass[0, 0]) / (2 * scores.shape[1]))
        if len(likely):  # none are where the scores hold NaN
            near, probabilities = distance[:, likely], probabilities[:, likely]
    order = np.argsort(near, axis=1)
    reached = running_totals(np.take_along_axis(probabilities, order, axis=1))
    last = (reached.astype(np.float32) < mass.astype(np.float32)).sum(axis=1, keepdims=True)
    last = np.take_along_axis(order, np.minimum(last, near.shape[1] - 1), axis=1)
    farthest = np.take_along_axis(near, last, axis=1)
    far = distance > farthest
    if max(keep) > 1:
        far &= ~_best(-distance, keep)
    scores[far] = -np.inf


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
    """Return the entropy of each row of log-probabilities, shape (rows, 1)."""
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
