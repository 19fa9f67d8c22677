"""Arrays of scores over the vocabulary, and the few candidates that are left of them.

All arithmetic on scores is float32, as in transformers. Sums over a row are made of float32 sums of 64
columns that are added up in float64, so that padding at the end of a row changes no bit of them, and a
request chooses the same tokens whatever runs beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Rows = NDArray[np.intp]

BLOCK: Final = 64
"""Tokens whose maximum is taken together."""
FEW: Final = 4
"""How many times more blocks than wanted tokens there must be for the maxima to be of use."""

_LOWEST: Final = np.finfo(np.float32).min
"""Below it is minus infinity alone, the score of tokens that were removed: a grammar leaves some hundred of all."""


@dataclass(slots=True)
class Candidates:
    """The tokens that may still be chosen in each row, in the order of their ids.

    Attributes:
        scores: shape (rows, n). Minus infinity where a token was removed, and in the padding at the end of a row.
        tokens: ids of the columns, shape (rows, n); None when column and token id are the same.
    """

    scores: Scores
    tokens: NDArray[np.int32] | None = None

    def token_ids(self, rows: Rows, columns: Rows) -> NDArray[np.int32]:
        """Return the token ids at the given places, shape of `rows` and `columns`."""
        return columns.astype(np.int32) if self.tokens is None else self.tokens[rows, columns]


def top_candidates(scores: Scores, k: Sequence[int]) -> Candidates:
    """Return the tokens of each row that score at least as high as its k-th highest. Follows ``TopKLogitsWarper``.

    The maxima of strided blocks bound the k-th highest score from below, and only blocks that reach the bound are
    read again: a few passes of ``argmax`` where a partition costs a hundred.

    The scores are of shape (rows, vocabulary); a row with NaN keeps NaN alone. A `k` of each row is at least 1, and may
    be more than there are tokens.
    """
    rows, size = scores.shape
    widest = min(max(k), size)
    blocks = size // BLOCK
    if widest * FEW > blocks:
        highest = scores.max(axis=1)
        bound = np.maximum(np.partition(scores, size - widest, axis=1)[:, size - widest], _LOWEST)
        found = (scores >= bound[:, None]).ravel().nonzero()[0]
        row = found // size
        chosen = pad_rows(rows, row, found - row * size, scores.ravel()[found])
    else:
        maxima = _cube(scores).max(axis=1)
        highest = maxima.max(axis=1)
        bound = np.maximum(np.partition(maxima, blocks - widest, axis=1)[:, blocks - widest], _LOWEST)
        chosen = pad_rows(rows, *_at_least(scores, maxima, bound))
    if chosen.scores.shape[1] > widest or min(k) < widest:
        chosen.scores[chosen.scores < kth_highest(chosen.scores, k)] = -np.inf
    broken = np.isnan(highest)
    if broken.any():
        chosen.scores[broken] = -np.inf
        chosen.scores[broken, 0] = np.nan
    return chosen


def kth_highest(scores: Scores, k: Sequence[int]) -> Scores:
    """Return the k-th highest score of each row (the lowest when there are fewer), shape (rows, 1)."""
    width = scores.shape[1]
    widest = max(k)
    if widest * FEW < width:
        scores = np.partition(scores, width - widest, axis=1)[:, width - widest :]
        width = widest
    columns = [max(width - each, 0) for each in k]
    return np.sort(scores, axis=1)[range(len(columns)), columns][:, None]


def top_of_all(scores: Scores, offsets: Scores, k: int) -> tuple[Scores, Rows, NDArray[np.int32]]:
    """Find the k highest of all scores, shape (rows, vocabulary), after adding an offset to each row, shape (rows,).

    Return the sums in descending order (NaN first, ties by row and token), their rows, and their tokens, each (k,).
    """
    rows, size = scores.shape
    blocks = size // BLOCK
    if k * FEW <= rows * blocks:
        maxima = _cube(scores).max(axis=1) + offsets[:, None]
        bound = np.partition(maxima, rows * blocks - k, axis=None)[rows * blocks - k]
        if bound > -np.inf and not np.isnan(maxima).any():
            row, token, values = _at_least(scores, maxima, np.full(rows, bound), offsets)
            best = np.argsort(-values, kind="stable")[:k]
            return values[best], row[best], token[best].astype(np.int32)
    flat = (scores + offsets[:, None]).ravel()
    missing, possible = np.flatnonzero(np.isnan(flat)), np.flatnonzero(flat > -np.inf)
    ranked = possible[np.argsort(-flat[possible], kind="stable")]
    order = np.concatenate((missing, ranked, np.flatnonzero(flat == -np.inf)))[:k]
    row, token = np.divmod(order, size)
    return flat[order], row, token.astype(np.int32)


def _cube(scores: Scores) -> Scores:
    # Block b holds the tokens b, b + blocks, b + 2 * blocks, ...: maxima over blocks are then taken over
    # long, contiguous lines.
    rows, size = scores.shape
    blocks = size // BLOCK
    return scores[:, : blocks * BLOCK].reshape(rows, BLOCK, blocks)


def _at_least(
    scores: Scores, maxima: Scores, bound: Scores, offsets: Scores | None = None
) -> tuple[Rows, Rows, Scores]:
    """Find all (row, token) whose score, with its row's offset, reaches the row's bound; by row, then by token."""
    size = scores.shape[1]
    blocks = maxima.shape[1]
    reaching = (maxima >= bound[:, None]).ravel().nonzero()[0]
    block_row = reaching // blocks
    block = reaching - block_row * blocks
    columns = _cube(scores)[block_row, :, block]
    if offsets is not None:
        columns += offsets[block_row][:, None]
    found = (columns >= bound[block_row][:, None]).ravel().nonzero()[0]
    member = found // BLOCK
    row, token, values = block_row[member], (found - member * BLOCK) * blocks + block[member], columns.ravel()[found]
    if blocks * BLOCK < size:
        rest = scores[:, blocks * BLOCK :]
        if offsets is not None:
            rest = rest + offsets[:, None]
        rest_row, rest_column = (rest >= bound[:, None]).nonzero()
        row = np.concatenate((row, rest_row))
        token = np.concatenate((token, rest_column + blocks * BLOCK))
        values = np.concatenate((values, rest[rest_row, rest_column]))
    order = (row * size + token).argsort()
    return row[order], token[order], values[order]


def pad_rows(rows: int, row: Rows, token: Rows, values: Scores) -> Candidates:
    """Lay flat finds, sorted by row and token, out as rows of equal length."""
    if rows == 1 and len(values):
        return Candidates(values[None], token[None].astype(np.int32))
    counts = np.bincount(row, minlength=rows)
    width = max(int(counts.max()), 1)
    column = np.arange(len(row)) - (counts.cumsum() - counts)[row]
    scores = np.full((rows, width), -np.inf, dtype=np.float32)
    tokens = np.zeros((rows, width), dtype=np.int32)
    scores[row, column] = values
    tokens[row, column] = token
    return Candidates(scores, tokens)


def weights(scores: Scores) -> Scores:
    """Return exp(score - highest of the row), in new memory."""
    result: Scores = scores - scores.max(axis=1, keepdims=True)
    np.exp(result, out=result)
    return result


def running_totals(values: Scores) -> NDArray[np.float64]:
    """Return the sums of the first columns, column by column."""
    return values.cumsum(axis=1, dtype=np.float64)


def totals(values: Scores, *, whole: bool) -> NDArray[np.float64]:
    """Return the sum of each row, shape (rows, 1). Rows that do not hold the whole vocabulary are candidates."""
    if whole:
        return np.asarray(values.sum(axis=1, keepdims=True), dtype=np.float64)
    return running_totals(values)[:, -1:]


def softmax(scores: Scores, *, whole: bool) -> Scores:
    """Return the softmax of each row, in new memory. See `totals`."""
    weighed = weights(scores)
    weighed /= totals(weighed, whole=whole).astype(np.float32)
    return weighed


def log_softmax(scores: Scores, *, whole: bool = True) -> None:
    """Replace the scores of each row by their log-softmax, in place. See `totals`."""
    if not whole:
        scores -= scores.max(axis=1, keepdims=True)
        scores -= np.log(totals(np.exp(scores), whole=False)).astype(np.float32)
        return
    weighed = np.empty(scores.shape[1], dtype=np.float32)
    # Row by row, so that the exponentials stay in the processor's second-level cache.
    for row in range(len(scores)):
        line = scores[row]
        line -= line.max()
        np.exp(line, out=weighed)
        line -= np.log(weighed.sum())
