"""What must hold for every request: bans hold, the order of rows is nothing, equal n-grams do not come twice."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_phi3.generation.logits import softmax
from edge_phi3.generation.warpers import Warping, warp
from tests.generation.conftest import VOCABULARY, answer, table_model

PROMPT = (5, 6, 7, 5, 6)
MODES = st.sampled_from(
    [
        {"do_sample": False},
        {"num_return_sequences": 3},
        {"num_return_sequences": 2, "top_k": 0, "top_p": 0.9},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 3, "temperature": 1.5},
        {"do_sample": False, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 4},
    ]
)
TOKENS = st.integers(2, VOCABULARY - 1)


def generated(seed: int, **options: Any) -> list[list[int]]:
    result = answer(table_model(seed % 7), PROMPT, seed=seed, max_new_tokens=15, eos_token_id=[], **options)
    return [tokens.tolist() for tokens in result.sequences]


def holds(tokens: list[int], phrase: list[int], start: int) -> bool:
    """Return whether a phrase ends at or after a place."""
    return any(tokens[at : at + len(phrase)] == phrase for at in range(max(start - len(phrase) + 1, 0), len(tokens)))


@settings(deadline=None, max_examples=60)
@given(
    MODES,
    st.integers(0, 100),
    st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=60),
    st.lists(TOKENS, max_size=60),
)
def test_banned_tokens_and_phrases_never_appear(
    mode: dict[str, Any], seed: int, phrases: list[list[int]], suppressed: list[int]
) -> None:
    # What the model would say, so that bans bite.
    said = generated(seed, **mode)[0][len(PROMPT) :]
    phrases += [said[:1], said[1:3], [PROMPT[-1], said[0]]]
    for tokens in generated(seed, bad_words_ids=phrases, suppress_tokens=suppressed, **mode):
        assert not [phrase for phrase in phrases if holds(tokens, phrase, len(PROMPT))]
        assert not set(tokens[len(PROMPT) :]) & set(suppressed)


@settings(deadline=None, max_examples=80)
@given(MODES, st.integers(0, 100), st.integers(1, 4), st.booleans())
def test_no_ngram_comes_twice(mode: dict[str, Any], seed: int, size: int, of_the_prompt: bool) -> None:
    name = "encoder_no_repeat_ngram_size" if of_the_prompt else "no_repeat_ngram_size"
    for tokens in generated(seed, **{name: size}, **mode):
        ngrams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
        old, new = ngrams[: len(PROMPT) - size + 1], ngrams[len(PROMPT) - size + 1 :]
        assert of_the_prompt or len(set(new)) == len(new)
        assert not set(new) & set(old)


ROWS = st.integers(1, 6)
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
    rows = draw(ROWS)
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
