"""OpenAI's presence and frequency penalties: their formula, what counts, and that they change nothing while off."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from edge_phi3.generation import GenerationConfig, ParameterError, make_decoder
from edge_phi3.generation.processors import OccurrencePenalty, build_processors
from tests.generation.conftest import DEFAULTS, decoder, run, table_model

PROMPT = (5, 6, 7, 5, 6)


def penalised(presence: float, frequency: float, **options: Any) -> list[list[int]]:
    config = GenerationConfig.resolve(options, DEFAULTS)
    config = dataclasses.replace(config, presence_penalty=presence, frequency_penalty=frequency)
    each = make_decoder(config, np.array(PROMPT, np.int32))
    run(table_model(3), (each, PROMPT))
    return [tokens.tolist()[len(PROMPT) :] for tokens in each.result().sequences]


def test_each_score_loses_what_the_formula_says_and_the_prompt_does_not_count() -> None:
    tokens = np.array([[1, 2, 7, 7, 9, 7], [1, 2, 8, 9, 9, 8]], np.int32)
    scores = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    expected = scores.copy()
    for row, line in enumerate(tokens[:, 2:].tolist()):
        for token in range(12):
            count = line.count(token)
            expected[row, token] -= np.float32(count * 0.5) + np.float32(1.25 if count else 0)
    OccurrencePenalty(1.25, 0.5, 2)(tokens, scores)
    np.testing.assert_array_equal(scores, expected)


def test_before_the_first_token_nothing_is_penalised() -> None:
    scores = np.ones((1, 12), np.float32)
    OccurrencePenalty(2, 2, 3)(np.array([[1, 2, 3]], np.int32), scores)
    assert (scores == 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "max_new_tokens": 30, "eos_token_id": []},
        {"seed": 4, "num_return_sequences": 3, "max_new_tokens": 30, "eos_token_id": []},
        {"do_sample": False, "num_beams": 3, "max_new_tokens": 12, "eos_token_id": []},
    ],
)
def test_they_spread_answers_over_more_tokens_in_every_mode(options: dict[str, Any]) -> None:
    def different(sequences: list[list[int]]) -> int:
        return sum(len(set(tokens)) for tokens in sequences)

    assert different(penalised(2.0, 2.0, **options)) > different(penalised(-2.0, -2.0, **options))
    each = decoder(PROMPT, **options)
    run(table_model(3), (each, PROMPT))
    assert penalised(0.0, 0.0, **options) == [tokens.tolist()[len(PROMPT) :] for tokens in each.result().sequences]


def test_while_off_they_are_not_built_and_no_parameters_of_generate() -> None:
    assert build_processors(GenerationConfig.resolve({}, DEFAULTS), np.array(PROMPT)) == ()
    with pytest.raises(ParameterError, match="`presence_penalty` is not a generation parameter"):
        GenerationConfig.resolve({"presence_penalty": 1.0}, DEFAULTS)
