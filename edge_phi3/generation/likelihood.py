"""How likely the model itself held tokens, before processors and warpers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.decoding import TokenLogprobs
from edge_phi3.generation.logits import Scores


def token_logprobs(rows: Scores, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of tokens, and of so many of the likeliest at the place of each.

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
