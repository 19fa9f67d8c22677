"""One token from the top k of one row, in few calls.

Between two steps of a model all code and data leave the processor's caches. Then a NumPy call costs more than its work,
and so does every line of Python; nothing else is done meanwhile. What is here does what `generation.warpers` and
`generation.drawing` do, for one row and the most common warpers, with the same result bit for bit.
"""

from __future__ import annotations

import math

import numpy as np

from edge_phi3.generation.logits import BLOCK, FEW, MILD, SLACK, Scores

_LARGE = 1e30


def draw_from_top_k(line: Scores, temperature: float | None, k: int, uniform: float) -> int | None:
    """Divide a row by its temperature, keep the top k, and draw by inverting the cumulative distribution.

    The maxima of strided blocks bound the k-th highest score from below: what reaches the bound is little more than the
    top k. Follows ``TemperatureLogitsWarper`` and ``TopKLogitsWarper``: what ties with the k-th highest stays.

    Args:
        line: scores, shape (vocabulary,).
        temperature: None for 1.
        k: at least 1.
        uniform: a number in [0, 1).

    Returns:
        The token; None where the general way must be taken: for a k that is too large, a temperature that is not mild,
        and a row with NaN or with scores near infinity among its highest.
    """
    blocks = len(line) // BLOCK
    mild = temperature is None or MILD[0] <= temperature <= MILD[1]
    if not mild or k * FEW > blocks or blocks * BLOCK != len(line):
        return None
    maxima = line.reshape(BLOCK, blocks).max(axis=0)
    maxima.sort()  # faster than a partition of so few, and NaN comes last
    bound, highest = maxima[blocks - k], maxima[blocks - 1]
    if not -_LARGE < bound <= highest < _LARGE:
        return None
    if temperature is not None:
        # Scores that differ may be equal once they are divided and rounded.
        bound -= abs(bound) * np.float32(SLACK)
    tokens = (line >= bound).nonzero()[0]
    values = line[tokens]
    if temperature is not None:
        values /= np.float32(temperature)
        highest /= np.float32(temperature)
    weights = np.exp(values - highest)
    return _invert(tokens.tolist(), values.tolist(), weights.tolist(), k, uniform)


def _invert(tokens: list[int], scores: list[float], weights: list[float], k: int, uniform: float) -> int:
    """Draw from the k highest, and those that tie with the last, in the order of token ids."""
    least = sorted(scores)[-k]
    total = 0.0
    shares: list[tuple[float, int]] = []
    for token, score, weight in zip(tokens, scores, weights, strict=True):
        if score >= least:
            total += weight
            shares.append((total, token))
    # Below the total even where the product rounds up, so that a token of probability 0 is never reached.
    target = min(uniform * total, math.nextafter(total, 0))
    for share, token in shares:
        if share > target:
            return token
    return shares[-1][1]
