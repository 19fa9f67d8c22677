"""Selections and sums over the vocabulary, and warpers, against the plain way of doing them; processors' order."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_phi3.generation import GenerationConfig
from edge_phi3.generation.logits import log_softmax, softmax, top_candidates, top_of_all, totals, weights
from edge_phi3.generation.processors import build_processors
from edge_phi3.generation.warpers import Warping, warp
from tests.golden.generation_data import REPLAY_DEFAULTS
from tests.support.cases import tables

SIZES = (5, 64, 96, 1000, 4096, 5003, 32064)
KINDS = ("plain", "ties", "banned", "flat", "peaks")


def random_scores(seed: int, rows: int, size: int, kind: str) -> NDArray[np.float32]:
    random = np.random.Generator(np.random.PCG64(seed))
    scores = (random.standard_normal((rows, size)) * 3).astype(np.float32)
    if kind == "ties":
        scores[:] = np.round(scores * 2) / 2
    elif kind == "banned":
        scores[random.random(scores.shape) < 0.9] = -np.inf
        scores[:, 0] = 0
    elif kind == "flat":
        scores[:] = 1
    elif kind == "peaks":
        # Neighbours: all in different blocks of the search, or all in one.
        scores[:, : size // 3] += 20
    return scores


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("size", SIZES)
def test_tokens_that_were_removed_are_no_candidates(size: int) -> None:
    scores = np.full((3, size), -np.inf, np.float32)
    scores[0, [1, 4]] = scores[2, 3] = 1
    for k in (1, 2, 10, 50, size):
        chosen = top_candidates(scores.copy(), [k] * 3)
        assert chosen.scores.shape[1] <= 2, "what follows costs as much as there are"
        assert [(row > -np.inf).sum() for row in chosen.scores] == [2, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "size", "k"), [(1, 96, 8), (4, 96, 300), (8, 32064, 32), (3, 5003, 20), (2, 64, 128)])
def test_top_of_all_sorts_by_score_then_row_then_token(rows: int, size: int, k: int, kind: str) -> None:
    scores = random_scores(k, rows, size, kind)
    offsets = -np.arange(rows, dtype=np.float32)[::-1].copy()
    values, row, token = top_of_all(scores, offsets, k)
    flat = (scores + offsets[:, None]).ravel()
    expected = np.argsort(-flat, kind="stable")[:k]
    assert np.array_equal(row * size + token, expected)
    assert np.array_equal(values, flat[expected])


@pytest.mark.parametrize("size", [96, 32064])
def test_nan_is_kept_alone_and_comes_first(size: int) -> None:
    scores = random_scores(1, 3, size, "plain")
    scores[1, 40] = np.nan
    chosen = top_candidates(scores.copy(), [10, 10, 10])
    assert np.isnan(chosen.scores[1]).sum() == 1
    assert [(chosen.scores[row] > -np.inf).sum() for row in range(3)] == [10, 0, 10]
    values, row, token = top_of_all(scores, np.zeros(3, dtype=np.float32), 4)
    assert (row[0], token[0]) == (1, 40)
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


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(["top_p", "typical_p"]), mass=st.floats(0, 0.999), keep=st.integers(1, 4),
    kind=st.sampled_from(KINDS), spread=st.floats(0.05, 30), size=st.sampled_from([5, 300, 5003]),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_tokens_are_kept_until_they_reach_the_mass(
    *, name: str, mass: float, keep: int, kind: str, spread: float, size: int, seed: int
) -> None:
    """Whole rows are sorted only where it matters; here they are compared with sorting all of them."""
    scores = random_scores(seed, 2, size, kind) * np.float32(spread)
    with np.errstate(all="ignore"):
        cut = warp(scores.copy(), [Warping((name,), (mass,), keep)] * 2)
        normalized = scores.copy()
        log_softmax(normalized)
        probabilities = np.exp(normalized).astype(np.float64)
        entropy = -np.nansum(probabilities * normalized, axis=1, keepdims=True)
        keys = -scores if name == "top_p" else np.abs(-normalized - entropy)
    for row, key in enumerate(keys):
        # Of equal scores top-p removes the first.
        order = np.argsort(scores[row], kind="stable")[::-1] if name == "top_p" else np.argsort(key, kind="stable")
        before = np.cumsum(probabilities[row, order]) - probabilities[row, order]
        expected = (before < mass) & (scores[row, order] > -np.inf)
        columns = np.flatnonzero(cut.scores[row] > -np.inf)
        ours = np.isin(order, cut.token_ids(np.full_like(columns, row), columns))
        assert ours.sum() >= min(keep, int((scores[row] > -np.inf).sum()))
        # The last bits of sums, and of distances from the entropy, may decide about tokens at the very edge.
        sure = np.abs(before - mass) > 1e-5
        if name == "typical_p":
            edges = key[order[~sure | (np.arange(size) == max(int((before < mass).sum()) - 1, 0))]]
            near = 1e-4 * (1 + np.abs(key[order]))
            sure &= (key[order] < edges.min() - near) | (key[order] > edges.max() + near)
        assert np.array_equal(ours[keep:][sure[keep:]], expected[keep:][sure[keep:]])
        assert name == "typical_p" or ours[: min(keep, expected.sum() or 1)].all()


def test_typical_p_leaves_out_a_likely_token_that_is_farther_from_the_entropy_than_unlikely_ones() -> None:
    probabilities = np.concatenate(([0.3], np.full(3000, 0.63 / 3000), np.full(2002, 0.07 / 2002)))
    left = warp(np.log(probabilities)[None].astype(np.float32), [Warping(("typical_p",), (0.65,), 1)])
    assert np.array_equal(left.scores[0] > -np.inf, probabilities < 0.3)


SETTINGS: dict[str, st.SearchStrategy[float]] = {
    "temperature": st.floats(0.05, 20),
    "top_k": st.integers(1, 80).map(float),
    "top_p": st.floats(0, 0.999),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.01, 0.99),
    "epsilon_cutoff": st.floats(0.0001, 0.9),
    "eta_cutoff": st.floats(0.0001, 0.9),
    "renormalize_logits": st.just(1.0),
}


@st.composite
def warped_rows(draw: st.DrawFn) -> tuple[NDArray[np.float32], list[Warping]]:
    names = tuple(name for name in SETTINGS if draw(st.booleans()))
    rows = draw(st.integers(1, 6))
    keep = draw(st.integers(1, 4))
    warpings = [Warping(names, tuple(draw(SETTINGS[name]) for name in names), keep) for _ in range(rows)]
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.sampled_from([64, 200, 2048, 32064]))
    scores = (random.standard_normal((rows, size)) * draw(st.floats(0.1, 8))).astype(np.float32)
    return scores, warpings


def survivors(scores: NDArray[np.float32], warpings: list[Warping]) -> list[dict[int, float]]:
    with np.errstate(all="ignore"):
        left = warp(scores.copy(), warpings)
        probabilities = softmax(left.scores, whole=False)
    rows = []
    for row in range(len(scores)):
        columns = np.flatnonzero(left.scores[row] > -np.inf)
        tokens = left.token_ids(np.full_like(columns, row), columns)
        rows.append(dict(zip(tokens.tolist(), probabilities[row, columns].tolist(), strict=True)))
    return rows


@settings(deadline=None, max_examples=150)
@given(warped_rows(), st.randoms(use_true_random=False))
def test_the_best_tokens_are_kept_and_the_order_of_rows_does_not_matter(
    case: tuple[NDArray[np.float32], list[Warping]], random: Any
) -> None:
    scores, warpings = case
    together = survivors(scores, warpings)
    for line, warping, left in zip(scores, warpings, together, strict=True):
        assert len(left) >= 1
        if "typical_p" not in warping.active:
            assert set(np.argsort(-line)[: min(warping.keep, len(left))].tolist()) <= left.keys()
            assert len(left) >= warping.keep or "top_k" in warping.active
    order = list(range(len(scores)))
    random.shuffle(order)
    assert survivors(scores[order], [warpings[row] for row in order]) == [together[row] for row in order]
    assert [survivors(scores[row : row + 1], warpings[row : row + 1])[0] for row in range(len(scores))] == together


# -- processors


def test_processors_follow_the_order_of_transformers_and_what_is_off_is_not_built() -> None:
    everything = tables(__file__)["EVERYTHING"]
    config = dataclasses.replace(GenerationConfig.resolve(everything, REPLAY_DEFAULTS), presence_penalty=1.0)
    built = build_processors(config, np.ones(1, dtype=np.int32))
    functions = [getattr(processor, "func", processor) for processor in built]
    names = [getattr(function, "__name__", type(function).__name__) for function in functions]
    assert names == tables(__file__)["ORDER"]
    # Invalid values become 0 and the largest numbers.
    largest = np.finfo(np.float32).max
    scores = np.array([[np.inf, -np.inf, np.nan, 1.5]], dtype=np.float32)
    built[names.index("make_finite")](np.ones((1, 1), dtype=np.int32), scores)
    np.testing.assert_array_equal(scores, np.array([[largest, -largest, 0, 1.5]], dtype=np.float32))
    usual = GenerationConfig.resolve({}, REPLAY_DEFAULTS)
    assert build_processors(usual, np.ones(11, dtype=np.int32)) == ()
    assert Warping.of(usual).active == ("top_k",)


@pytest.mark.parametrize(("count", "first"), [(1, 3), (3, 2), (64, 0), (-1, 0), (0, 4)])
def test_a_repeat_penalty_looks_back_on_the_last_tokens_prompt_included(count: int, first: int) -> None:
    config = GenerationConfig.resolve({}, REPLAY_DEFAULTS)
    config = dataclasses.replace(config, repeat_penalty=2.0, repeat_last_n=count)
    scores = np.array([[4, -4, 3, -3, 5, -5]], np.float32)
    changed, tokens = scores.copy(), np.array([[0, 1, 2, 3, 3]], np.int32)
    for process in build_processors(config, tokens[0, :3]):
        process(tokens, changed)
    factors = np.where(scores[0] > 0, 0.5, 2)
    factors[[*range(first), 4, 5]] = 1  # the tokens from the first on, to 3, are those of the text
    assert changed[0].tolist() == (scores[0] * factors).tolist()
