"""Arrays of scores over the vocabulary, and the few candidates that are left of them.

All arithmetic is float32, as in transformers, with sums accumulated in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]

_BLOCK: Final = 64


@dataclass(slots=True)
class Candidates:
    """The tokens that may still be chosen in each row, in the order of their ids.

    Attributes:
        scores: shape (rows, n). Minus infinity where a token was removed, and in the padding at the end of a
            row.
        tokens: ids of the columns, shape (rows, n); None when column and token id are the same.
    """

    scores: Scores
    tokens: NDArray[np.int32] | None = None


def top_candidates(scores: Scores, k: NDArray[np.intp], slack: float = 0.0) -> Candidates:
    """Keep the tokens of each row that score at least as high as its k-th highest.

    The maxima of strided blocks bound the k-th highest score from below; only blocks that reach the bound are
    read again. This costs about four passes of ``argmax`` where a partition costs a hundred.

    Args:
        scores: shape (rows, vocabulary). A row with NaN keeps nothing.
        k: shape (rows,), at least 1; more than the vocabulary means all of it.
        slack: keep also what lies below the k-th highest score by this fraction of it. The caller then
            selects again.

    Returns:
        The candidates; every token that ties with the k-th highest is among them.
    """
    rows, size = scores.shape
    k = np.minimum(k, size)
    widest = int(k.max())
    blocks = size // _BLOCK
    if widest * 4 > blocks:
        bound = np.partition(scores, size - widest, axis=1)[:, size - widest]
        bound -= _fraction(bound, slack)
        found = np.flatnonzero(scores >= bound[:, None])
        row, token = np.divmod(found, size)
        values = scores.ravel()[found]
    else:
        cube = scores[:, : blocks * _BLOCK].reshape(rows, _BLOCK, blocks)
        maxima = cube.max(axis=1)
        bound = np.partition(maxima, blocks - widest, axis=1)[:, blocks - widest]
        bound -= _fraction(bound, slack)
        row, token, values = _at_least(scores, cube, maxima, bound)
    chosen = _pad_rows(rows, row, token, values)
    if slack == 0.0:
        keep_top(chosen, k)
    return chosen


def _fraction(bound: Scores, slack: float) -> Scores:
    return np.asarray(np.abs(bound) * slack, dtype=np.float32)


def keep_top(candidates: Candidates, k: NDArray[np.intp]) -> None:
    """Remove, in place, the candidates of each row that score below its k-th highest.

    Follows ``TopKLogitsWarper``: what ties with the k-th highest stays.

    Args:
        candidates: `scores` is changed.
        k: shape (rows,), at least 1.
    """
    scores = candidates.scores
    width = scores.shape[1]
    if width <= int(k.min()):
        return
    column = np.maximum(width - k, 0)[:, None]
    lowest = np.take_along_axis(np.sort(scores, axis=1), column, axis=1)
    scores[scores < lowest] = -np.inf


def _at_least(
    scores: Scores, cube: Scores, maxima: Scores, bound: Scores
) -> tuple[NDArray[np.intp], NDArray[np.intp], Scores]:
    """Find all (row, token) whose score reaches the row's bound, by row and then by token."""
    size = scores.shape[1]
    blocks = maxima.shape[1]
    block_row, block = np.divmod(np.flatnonzero(maxima >= bound[:, None]), blocks)
    columns = cube[block_row, :, block]
    found = np.flatnonzero(columns >= bound[block_row][:, None])
    member, line = np.divmod(found, _BLOCK)
    row, token, values = block_row[member], line * blocks + block[member], columns.ravel()[found]
    if blocks * _BLOCK < size:
        rest = scores[:, blocks * _BLOCK :]
        rest_row, rest_column = np.nonzero(rest >= bound[:, None])
        row = np.concatenate((row, rest_row))
        token = np.concatenate((token, rest_column + blocks * _BLOCK))
        values = np.concatenate((values, rest[rest_row, rest_column]))
    order = np.argsort(row * size + token)
    return row[order], token[order], values[order]


def _pad_rows(rows: int, row: NDArray[np.intp], token: NDArray[np.intp], values: Scores) -> Candidates:
    """Lay flat finds, sorted by row, out as rows of equal length."""
    counts = np.bincount(row, minlength=rows)
    width = max(int(counts.max()), 1)
    column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    scores = np.full((rows, width), -np.inf, dtype=np.float32)
    tokens = np.zeros((rows, width), dtype=np.int32)
    scores[row, column] = values
    tokens[row, column] = token
    return Candidates(scores, tokens)


def log_sum_exp(scores: Scores) -> Scores:
    """Give the logarithm of the sum of exponentials of each row, shape (rows, 1)."""
    highest = scores.max(axis=1, keepdims=True)
    total = np.exp(scores - highest).sum(axis=1, keepdims=True, dtype=np.float32)
    return np.asarray(highest + np.log(total), dtype=np.float32)
