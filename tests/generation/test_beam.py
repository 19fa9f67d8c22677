"""Beam search beyond the recorded requests."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from edge_phi3.generation import ModelDefaults
from tests.generation.conftest import Model, Prefix, answer, table_model

PROMPT = (5, 6, 7)


def log_probability(model: Model, tokens: Prefix, start: int = len(PROMPT)) -> float:
    """Sum the log-probabilities of the tokens from a place on, in float64."""
    rows = [model(tokens[:length]).astype(np.float64) for length in range(start, len(tokens))]
    return float(sum(row[token] - np.log(np.exp(row).sum()) for row, token in zip(rows, tokens[start:], strict=True)))


def test_as_many_beams_as_continuations_find_the_best_of_all() -> None:
    """With room for every continuation, beam search is exhaustive search."""
    model = table_model(9, 6, 1.0)
    defaults = ModelDefaults(vocab_size=6, bos_token_id=1, eos_token_ids=(), pad_token_id=0, context_length=64)
    options = {"do_sample": False, "num_beams": 36, "num_return_sequences": 5, "max_new_tokens": 3}
    result = answer(model, (1, 2, 3), defaults=defaults, **options)
    every = [(1, 2, 3, *tail) for tail in itertools.product(range(6), repeat=3)]
    best = sorted(every, key=lambda tokens: log_probability(model, tokens))[::-1][:5]
    assert [tuple(tokens.tolist()) for tokens in result.sequences] == best
    assert result.sequences_scores is not None
    np.testing.assert_allclose(
        result.sequences_scores, [log_probability(model, tokens) / 3 for tokens in best], rtol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scores_are_those_of_a_beams_own_tokens(groups: int) -> None:
    """transformers mixes up the beams of groups here, so that its answers do not show it."""
    options: dict[str, Any] = {"do_sample": False, "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 12}
    options |= {"output_scores": True, "return_dict_in_generate": True, "eos_token_id": [*range(2, 30)]}
    if groups > 1:
        options |= {"num_beam_groups": groups, "diversity_penalty": -1.0}  # below 0: groups, and no penalty
    model = table_model(3)
    result = answer(model, PROMPT, **options)
    assert result.scores is not None
    for tokens, scored in zip(result.sequences, result.scores, strict=True):
        # The first end token is written whichever ended the beam, so the last score need not be the beam's.
        expected = log_probability(model, tuple(tokens[:-1].tolist()))
        assert sum(each.logprob for each in scored[:-1]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("length_penalty", "score"), [(1e6, -0.0), (-1e6, -np.inf)])
def test_extreme_length_penalties_do_not_overflow(length_penalty: float, score: float) -> None:
    options = {"do_sample": False, "num_beams": 2, "max_new_tokens": 3, "length_penalty": length_penalty}
    assert answer(table_model(1), PROMPT, **options).sequences_scores == [score]
