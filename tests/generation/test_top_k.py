"""Drawing from the top k of one row in few calls: the same token as the warpers and `draw` give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.generation.drawing import draw
from edge_phi3.generation.logits import Scores
from edge_phi3.generation.top_k import draw_from_top_k
from edge_phi3.generation.warpers import Warping, warp

VOCABULARY = 32064


def general(line: Scores, temperature: float | None, k: int, uniform: float) -> int:
    """Draw as many rows are drawn together: beside another row."""
    active = ("top_k",) if temperature is None else ("temperature", "top_k")
    own = (float(k),) if temperature is None else (temperature, float(k))
    other = tuple(5.0 for _ in own)
    with np.errstate(all="ignore"):
        candidates = warp(np.stack([line, -line]), [Warping(active, own, 1), Warping(active, other, 1)])
        draws = draw(candidates, np.arange(2), np.array([uniform, 0.5]))
    assert draws.possible[0]
    return int(draws.tokens[0])


def row(seed: int, levels: int | None, banned: float) -> Scores:
    """Make scores: normal, or of few levels so that many tie, with some tokens banned."""
    random = np.random.default_rng(seed)
    line = random.normal(0, 3, VOCABULARY) if levels is None else random.integers(0, levels, VOCABULARY) / 7
    line[random.random(VOCABULARY) < banned] = -np.inf
    scores: Scores = line.astype(np.float32)
    return scores


@settings(max_examples=150, deadline=None)
@given(
    line=st.builds(row, st.integers(0, 2**32), st.none() | st.integers(1, 40_000), st.sampled_from([0.0, 0.3, 0.9])),
    temperature=st.none() | st.floats(1e-3, 1e3),
    k=st.integers(1, 125),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_draws_as_the_warpers_do(line: Scores, temperature: float | None, k: int, uniform: float) -> None:
    token = draw_from_top_k(line.copy(), temperature, k, uniform)
    assert token is not None
    assert token == general(line, temperature, k, uniform)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_reaches_the_first_and_the_last_of_the_top_k(uniform: float) -> None:
    line = np.zeros(VOCABULARY, np.float32)
    line[[7, 300, 31000]] = 5
    assert draw_from_top_k(line, None, 3, uniform) == (7 if uniform == 0 else 31000)


@pytest.mark.parametrize(
    ("place", "value", "temperature", "k", "size"),
    [
        (5, np.nan, None, 5, VOCABULARY),
        (5, np.inf, None, 5, VOCABULARY),
        (5, 1e38, 0.5, 5, VOCABULARY),
        (slice(3, None), -np.inf, None, 5, VOCABULARY),
        (5, 1.0, 1e-4, 5, VOCABULARY),
        (5, 1.0, None, 126, VOCABULARY),
        (5, 1.0, None, 5, VOCABULARY - 1),
    ],
)
def test_leaves_the_hard_cases_to_the_general_way(
    place: int | slice, value: float, temperature: float | None, k: int, size: int
) -> None:
    line = row(0, None, 0)[:size]
    line[place] = value
    assert draw_from_top_k(line, temperature, k, 0.5) is None
