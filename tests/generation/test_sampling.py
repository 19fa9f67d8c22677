"""Greedy decoding and sampling: distributions, seeds, independence of neighbours, streaming."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.generation import GenerationError, ParameterError, advance
from edge_phi3.generation.drawing import draw
from edge_phi3.generation.logits import Candidates
from tests.generation.conftest import VOCABULARY, answer, decoder, run, table_model

PROMPT = (5, 6, 7)


def generated(*requests: dict[str, Any], seed: int = 1) -> list[list[list[int]]]:
    """Run requests together, and return the new tokens of each returned sequence."""
    decoders = [(decoder(PROMPT, **({"max_new_tokens": 25} | request)), PROMPT) for request in requests]
    run(table_model(seed), *decoders)
    return [[tokens[len(PROMPT) :].tolist() for tokens in each.result().sequences] for each, _ in decoders]


@pytest.mark.parametrize("options", [{"num_return_sequences": 2}, {"num_beams": 4, "temperature": 2.0}])
def test_equal_seeds_repeat_and_other_or_no_seeds_differ(options: dict[str, Any]) -> None:
    request = options | {"top_k": 0, "max_new_tokens": 20}
    first, again, *others = (str(generated(request | {"seed": seed})) for seed in (11, 11, 12, None, None))
    assert first == again
    assert len({first, *others}) == 4


def test_the_sequences_of_a_request_are_drawn_independently() -> None:
    request = {"seed": 1, "top_k": 0, "max_new_tokens": 300, "eos_token_id": []}
    (sequences,) = generated(request | {"num_return_sequences": 8})
    assert len({tuple(tokens) for tokens in sequences}) == 8
    # The first sequence does not depend on how many there are.
    assert generated(request) == [sequences[:1]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"top_k": 150}, {"num_beams": 2},
        *({"top_k": 0} | warper for warper in (
            {}, {"top_p": 0.5}, {"typical_p": 0.5}, {"min_p": 0.1}, {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1},
        )),
    ],
)  # fmt: skip
def test_sampling_refuses_scores_that_are_no_distribution(options: dict[str, Any], value: float) -> None:
    logits = table_model(1)(PROMPT)[None]
    logits[0, 100] = value
    each = decoder(PROMPT, **options)
    advance([each], logits.copy())
    assert isinstance(each.error, GenerationError)
    mended = decoder(PROMPT, remove_invalid_values=True, **options)
    if "num_beams" not in options:
        # Beams see log-probabilities, which one such value makes NaN altogether.
        advance([mended], logits.copy())
        assert mended.error is None


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("output_scores", [False, True])
def test_scores_are_recorded_where_both_options_are_on(dictionary: bool, output_scores: bool) -> None:
    options = {"return_dict_in_generate": dictionary, "output_scores": output_scores, "max_new_tokens": 3}
    assert (answer(table_model(1), PROMPT, **options).scores is not None) == (dictionary and output_scores)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32), st.integers(1, 2000), st.floats(0, 1, exclude_max=True), st.floats(0.01, 50), st.booleans()
)
def test_draws_invert_the_cumulative_distribution(
    seed: int, width: int, uniform: float, spread: float, whole: bool
) -> None:
    tokens = None if whole else np.tile(np.arange(width, dtype=np.int32), (2, 1))
    random = np.random.default_rng(seed)
    scores = (random.standard_normal((2, width)) * spread).astype(np.float32)
    scores[:, random.random(width) < 0.3] = -np.inf
    scores[:, random.integers(width)] = 0
    drawn = draw(Candidates(scores, tokens), np.array([0, 1]), np.array([uniform, uniform]))
    reached = np.cumsum(np.exp(scores - scores.max(1, keepdims=True)), axis=1, dtype=np.float64)
    reached /= reached[:, -1:]
    for row, token in enumerate(drawn.tokens.tolist()):
        assert scores[row, token] > -np.inf
        below = reached[row, token - 1] if token else 0.0
        assert below - 1e-6 <= uniform <= reached[row, token] + 1e-6


def test_draws_reach_the_last_token_and_never_an_impossible_one() -> None:
    scores = np.full((1, 1300), -np.inf, dtype=np.float32)
    scores[0, [3, 700, 1001]] = 0
    for tokens in (None, np.arange(1300, dtype=np.int32)[None]):
        for uniform, token in ((0.0, 3), (np.nextafter(1, 0), 1001), (0.34, 700), (1 / 3, 700)):
            assert draw(Candidates(scores, tokens), np.array([0]), np.array([uniform])).tokens[0] == token


def test_what_cannot_start_is_refused() -> None:
    with pytest.raises(ParameterError, match="3 tokens"):
        decoder(PROMPT, max_length=3)
    with pytest.raises(ValueError, match="at least one token"):
        decoder([])
    with pytest.raises(ValueError, match="rows of logits"):
        advance([decoder(PROMPT)], np.zeros((2, VOCABULARY), dtype=np.float32))
    with pytest.raises(ValueError, match="vocabulary"):
        decoder(PROMPT, stop_strings="a")
    for option in ({"top_logprobs": 1}, {"constraint": object()}):
        with pytest.raises(ValueError, match="Beam searches"):
            decoder(PROMPT, num_beams=2, **option)
