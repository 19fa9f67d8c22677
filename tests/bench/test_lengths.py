"""Distributions of lengths."""

from __future__ import annotations

import numpy as np
import pytest

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.lengths import Lengths


def draws(text: str, count: int = 4000) -> np.ndarray:
    lengths, random = Lengths.parse(text), np.random.default_rng(0)
    return np.array([lengths.draw(random) for _ in range(count)])


def test_a_number_is_that_number() -> None:
    assert set(draws("64").tolist()) == {64}


def test_a_range_is_uniform_with_both_ends() -> None:
    values, counts = np.unique(draws("16-19"), return_counts=True)
    assert values.tolist() == [16, 17, 18, 19]
    assert counts.min() > 900


@pytest.mark.parametrize(
    ("text", "median", "mean"),
    [
        ("normal:100,10", 100, 100),
        ("lognormal:100,0.5", 100, 100 * np.exp(0.125)),
        ("exponential:100", 100 * np.log(2), 100),
    ],
)
def test_named_distributions_have_their_medians_and_means(text: str, median: float, mean: float) -> None:
    drawn = draws(text, 20_000)
    assert np.median(drawn) == pytest.approx(median, rel=0.03)
    assert drawn.mean() == pytest.approx(mean, rel=0.03)


def test_no_length_is_below_one() -> None:
    assert draws("normal:1,50").min() == 1


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "x", "9-3", "0-4", "1.5", "normal:1", "normal:a,b", "zipf:2", "normal:1,2,3", "exponential:0"],
)
def test_everything_else_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(BenchError, match=r"give 64, 16-128"):
        Lengths.parse(text)
