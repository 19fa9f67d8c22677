"""Random numbers that depend on a request alone, and draws with them from what the warpers have left."""

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.logits import Candidates, Rows, Scores, running_totals, weights

_BLOCK: Final = 256
_DRAWN_AHEAD: Final = 64


def random_stream(seed: int, sequence: int) -> np.random.Generator:
    """Return the stream of one sequence: Philox, a counter-based generator, keyed by seed and sequence.

    A seed lies between 0 and 2**64 - 1; `sequence` is an index within the request. Salmon et al., Parallel Random
    Numbers: As Easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, sequence], dtype=np.uint64)))


def uniforms(seed: int, sequence: int) -> Iterator[float]:
    """Yield uniform numbers in [0, 1) of one sequence without end, drawn ahead because single draws are slow."""
    stream = random_stream(seed, sequence)
    while True:
        yield from stream.random(_DRAWN_AHEAD).tolist()


class Draws(NamedTuple):
    """Tokens drawn from candidates, with their processed scores, each attribute of shape (draws,).

    `possible` is whether the row was a distribution at all, `highest` its highest score, and `totals` the sum of its
    weights, exp(score - highest).
    """

    tokens: NDArray[np.int32]
    scores: Scores
    possible: NDArray[np.bool_]
    highest: Scores
    totals: NDArray[np.float64]

    def logprob(self, place: int) -> float:
        """Return the log-softmax of the processed scores at a draw from a row that was a distribution."""
        return float(self.scores[place] - self.highest[place] - np.float32(np.log(self.totals[place])))


def draw(candidates: Candidates, rows: NDArray[np.intp], uniforms: NDArray[np.float64]) -> Draws:
    """Draw tokens by inverting the cumulative distribution of each row, in the order of token ids.

    Each draw has a row and a uniform number in [0, 1), both of shape (draws,).
    """
    scores = candidates.scores
    if candidates.tokens is None:
        columns, totals = _invert_whole(scores, rows, uniforms)
    else:
        columns, totals = _invert(weights(scores), rows, uniforms)
    possible = np.isfinite(totals) & (totals > 0)
    columns = np.where(possible, columns, 0)
    chosen = scores[rows, columns]
    return Draws(candidates.token_ids(rows, columns), chosen, possible, scores.max(axis=1)[rows], totals)


def _invert(weighed: Scores, rows: Rows, uniforms: NDArray[np.float64]) -> tuple[Rows, NDArray[np.float64]]:
    """Find the first columns whose running totals exceed shares of their rows' totals; and the totals."""
    reached = running_totals(weighed)[rows]
    totals = reached[:, -1]
    # Below the total even where the product rounds up, so that a token of probability 0 is never reached.
    targets = np.minimum(uniforms * totals, np.nextafter(totals, 0))
    return np.minimum((reached <= targets[:, None]).sum(axis=1), reached.shape[1] - 1), totals


def _invert_whole(scores: Scores, rows: Rows, uniforms: NDArray[np.float64]) -> tuple[Rows, NDArray[np.float64]]:
    """Do the same over the whole vocabulary, row by row: first find the block, and then the column in it."""
    columns, totals = np.zeros_like(rows), np.empty(len(rows))
    starts = np.arange(0, scores.shape[1], _BLOCK)
    weighed = np.empty(scores.shape[1], dtype=np.float32)
    row = -1
    for place, uniform in enumerate(uniforms.tolist()):
        if rows[place] != row:
            row = rows[place]
            np.subtract(scores[row], scores[row].max(), out=weighed)
            np.exp(weighed, out=weighed)
            sums = np.add.reduceat(weighed, starts)
            reached = np.cumsum(sums, dtype=np.float64)
            total = reached[-1]
        totals[place] = total
        block = min(int(np.searchsorted(reached, min(uniform * total, np.nextafter(total, 0)), "right")), len(sums) - 1)
        inside = np.cumsum(weighed[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
        # The share within the block: its float64 sum may differ from its float32 sum in the last bits.
        share = (uniform * total - (reached[block] - sums[block])) / sums[block]
        target = min(max(share, 0.0) * inside[-1], np.nextafter(inside[-1], 0))
        columns[place] = starts[block] + min(int(np.searchsorted(inside, target, "right")), len(inside) - 1)
    return columns, totals
