"""Selections and sums over the vocabulary, against the plain way of doing them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_phi3.generation.drawing import draw
from edge_phi3.generation.logits import (
    log_softmax,
    softmax,
    top_candidates,
    top_of_all,
    totals,
    weights,
)
from edge_phi3.generation.warpers import Warping, warp

SIZES = (5, 64, 96, 1000, 4096, 5003, 32064)


def random_scores(seed: int, rows: int, size: int, kind: str) -> NDArray[np.float32]:
    random = np.random.Generator(np.random.PCG64(seed))
    scores = (random.standard_normal((rows, size)) * 3).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores * 2) / 2
    elif kind == "banned":
        scores[random.random(scores.shape) < 0.9] = -np.inf
        scores[:, 0] = 0
    elif kind == "flat":
        scores[:] = 1
    elif kind == "peaks":
        # Neighbours: all in different blocks of the search, or all in one.
        scores[:, : size // 3] += 20
    return scores


@pytest.mark.parametrize("kind", ["plain", "ties", "banned", "flat", "peaks"])
@pytest.mark.parametrize("size", SIZES)
def test_top_candidates_are_all_that_reach_the_kth_highest(size: int, kind: str) -> None:
    scores = random_scores(size, 5, size, kind)
    for ks in ([1, 1, 1, 1, 1], [10, 3, 7, 1, 10], [50, 50, 4, 60, 10**6]):
        chosen = top_candidates(scores.copy(), ks)
        for row in range(5):
            lowest = np.sort(scores[row])[::-1][min(ks[row], size) - 1]
            expected = np.flatnonzero((scores[row] >= lowest) & (scores[row] > -np.inf))
            left = chosen.scores[row] > -np.inf
            assert chosen.tokens is not None
            assert np.array_equal(chosen.tokens[row, left], expected)
            assert np.array_equal(chosen.scores[row, left], scores[row, expected])


@pytest.mark.parametrize("kind", ["plain", "ties", "banned", "flat", "peaks"])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("slack", [0.0, 1e-5])
def test_one_row_is_chosen_from_and_drawn_as_beside_another(kind: str, k: int, slack: float) -> None:
    scores = random_scores(11, 2, 32064, kind)
    together, alone = top_candidates(scores, [k, k], slack), top_candidates(scores[:1], [k], slack)
    left = np.flatnonzero(together.scores[0] > -np.inf)
    assert alone.tokens is not None
    assert together.tokens is not None
    kept = np.flatnonzero(alone.scores[0] > -np.inf)
    np.testing.assert_array_equal(alone.tokens[0, kept], together.tokens[0, left])
    np.testing.assert_array_equal(alone.scores[0, kept], together.scores[0, left])
    for uniform in (0.0, 0.3, 0.999999999):
        one = draw(alone, np.array([0]), np.array([uniform]))
        two = draw(together, np.array([0, 1]), np.array([uniform, uniform]))
        assert (one.tokens[0], one.scores[0], one.possible[0]) == (two.tokens[0], two.scores[0], two.possible[0])
        assert one.logprobs[0] == two.logprobs[0]


def test_a_row_with_nan_keeps_nan_alone() -> None:
    for size, k in ((32064, 10), (96, 10)):
        scores = random_scores(1, 3, size, "plain")
        scores[1, 40] = np.nan
        chosen = top_candidates(scores, [k, k, k])
        assert np.isnan(chosen.scores[1]).sum() == 1
        assert (chosen.scores[1] > -np.inf).sum() == 0
        assert [(chosen.scores[row] > -np.inf).sum() for row in (0, 2)] == [k, k]


@pytest.mark.parametrize("kind", ["plain", "ties", "banned", "flat"])
@pytest.mark.parametrize(("rows", "size", "k"), [(1, 96, 8), (4, 96, 300), (8, 32064, 32), (3, 5003, 20), (2, 64, 128)])
def test_top_of_all_sorts_by_score_then_row_then_token(rows: int, size: int, k: int, kind: str) -> None:
    scores = random_scores(k, rows, size, kind)
    offsets = -np.arange(rows, dtype=np.float32)[::-1].copy()
    values, row, token = top_of_all(scores, offsets, k)
    flat = (scores + offsets[:, None]).ravel()
    expected = np.argsort(-flat, kind="stable")[:k]
    assert np.array_equal(row * size + token, expected)
    assert np.array_equal(values, flat[expected])


def test_top_of_all_puts_nan_first() -> None:
    scores = random_scores(1, 2, 32064, "plain")
    scores[1, 7] = np.nan
    values, row, token = top_of_all(scores, np.zeros(2, dtype=np.float32), 4)
    assert (row[0], token[0]) == (1, 7)
    assert np.isnan(values[0])
    assert np.array_equal(values[1:], np.sort(scores[~np.isnan(scores)])[::-1][:3])


@pytest.mark.parametrize("size", SIZES)
def test_log_softmax_is_exact_to_float32(size: int) -> None:
    scores = random_scores(2, 3, size, "plain")
    scores[0, ::2] = -np.inf
    wide = scores.astype(np.float64)
    expected = wide - wide.max(1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    log_softmax(scores)
    np.testing.assert_allclose(scores, expected, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(softmax(scores, whole=True).sum(axis=1, dtype=np.float64), 1, rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(0, 200), st.integers(0, 2**32))
def test_removed_columns_change_no_bit_of_a_sum(width: int, removed: int, seed: int) -> None:
    scores = random_scores(seed, 3, width, "plain")
    places = np.sort(np.random.default_rng(seed).choice(width + removed, width, replace=False))
    wide = np.full((3, width + removed), -np.inf, dtype=np.float32)
    wide[:, places] = scores
    assert np.array_equal(totals(weights(scores), whole=False), totals(weights(wide), whole=False))
    assert np.array_equal(softmax(scores, whole=False), softmax(wide, whole=False)[:, places])
    log_softmax(scores, whole=False)
    log_softmax(wide, whole=False)
    assert np.array_equal(scores, wide[:, places])


@pytest.mark.parametrize("size", [96, 5003, 32064])
def test_whole_rows_are_summed_alike_alone_and_together(size: int) -> None:
    scores = random_scores(1, 7, size, "plain")
    for row in range(7):
        # At another address, too.
        alone = np.concatenate((np.zeros(row + 1, dtype=np.float32), scores[row]))[row + 1 :][None]
        assert np.array_equal(softmax(alone, whole=True)[0], softmax(scores, whole=True)[row])


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0, 0.999),
    st.integers(1, 4),
    st.sampled_from(["plain", "banned", "peaks", "flat"]),
    st.floats(0.05, 30),
    st.integers(0, 2**32),
)
def test_top_p_of_whole_rows_sorts_only_their_head_to_the_same_end(
    mass: float, keep: int, kind: str, spread: float, seed: int
) -> None:
    """The head of a row is enough for top-p; here it is compared with sorting all of it."""
    scores = random_scores(seed, 2, 5003, kind) * np.float32(spread)
    cut = warp(scores.copy(), [Warping(("top_p",), (mass,), keep)] * 2)
    probabilities = softmax(scores, whole=True).astype(np.float64)
    for row in range(2):
        order = np.argsort(scores[row], kind="stable")
        reached = np.cumsum(probabilities[row, order])
        removed = reached <= 1 - mass
        removed[-keep:] = False
        kept = np.sort(order[~removed & (scores[row, order] > -np.inf)])
        assert cut.tokens is not None
        ours = cut.tokens[row, cut.scores[row] > -np.inf]
        # The sums of five thousand probabilities may differ in their last bits.
        doubtful = order[np.abs(reached - (1 - mass)) < 1e-5]
        assert set(ours.tolist()) ^ set(kept.tolist()) <= set(doubtful.tolist())


def test_mild_temperatures_select_what_dividing_all_scores_selects() -> None:
    scores = random_scores(5, 8, 32064, "ties")
    for temperature in (0.3, 0.7, 1.7, 900.0, 1e-4, 1e4):
        warping = Warping(("temperature", "top_k"), (temperature, 12), 1)
        chosen = warp(scores.copy(), [warping] * 8)
        divided = scores / np.float32(temperature)
        assert chosen.tokens is not None
        for row in range(8):
            left = chosen.scores[row] > -np.inf
            expected = np.flatnonzero(divided[row] >= np.sort(divided[row])[-12])
            assert np.array_equal(chosen.tokens[row, left], expected)
            assert np.array_equal(chosen.scores[row, left], divided[row, expected])


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.01, 0.999),
    st.integers(1, 4),
    st.sampled_from(["plain", "banned", "peaks", "flat", "ties"]),
    st.floats(0.05, 30),
    st.integers(0, 2**32),
)
def test_typical_p_of_whole_rows_sorts_one_bin_to_the_same_end(
    mass: float, keep: int, kind: str, spread: float, seed: int
) -> None:
    scores = random_scores(seed, 2, 5003, kind) * np.float32(spread)
    with np.errstate(all="ignore"):
        cut = warp(scores.copy(), [Warping(("typical_p",), (mass,), keep)] * 2)
        normalized = scores.copy()
        log_softmax(normalized)
        probabilities = np.exp(normalized).astype(np.float64)
        entropy = -np.nansum(probabilities * normalized, axis=1, keepdims=True)
        distance = np.abs(-normalized - entropy)
    for row in range(2):
        order = np.argsort(distance[row], kind="stable")
        reached = np.cumsum(probabilities[row, order])
        last = min(int((reached < mass).sum()), len(order) - 1)
        kept = (distance[row] <= distance[row, order[last]]) & (scores[row] > -np.inf)
        ours = cut.scores[row] > -np.inf
        # The last bits of sums and distances may decide about tokens that lie at the very edge.
        edge = np.abs(distance[row] - distance[row, order[last]]) < 1e-4 * (1 + distance[row])
        doubtful = np.zeros_like(kept)
        doubtful[order[np.abs(reached - mass) < 1e-5]] = True
        near = distance[row] <= np.sort(distance[row])[min(last + 1 + int(doubtful.sum()), len(order) - 1)] + 1e-4
        wrong = (ours != kept) & ~edge & ~(doubtful | (near & doubtful.any()))
        wrong[order[:keep]] = False
        assert not wrong.any()
        assert ours.sum() >= min(keep, int((scores[row] > -np.inf).sum()))


@pytest.mark.parametrize("keep", [1, 4])
@pytest.mark.parametrize("size", [5, 32064])
def test_top_p_of_0_keeps_as_many_as_it_must(size: int, keep: int) -> None:
    flat = np.zeros((1, size), dtype=np.float32)
    peak = flat.copy()
    peak[0, 3] = 50
    for scores in (flat, peak):
        left = warp(scores.copy(), [Warping(("top_p",), (0.0,), keep)])
        assert (left.scores > -np.inf).sum() == keep
    assert left.tokens is not None
    assert 3 in left.tokens
