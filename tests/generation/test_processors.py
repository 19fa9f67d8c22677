"""Processors and warpers by themselves: order, what is off, and what transformers' recorded answers do not come to."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from edge_phi3.generation import GenerationConfig, ModelDefaults
from edge_phi3.generation.processors import build_processors
from edge_phi3.generation.warpers import Warping, warp

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

VOCABULARY = 80
DEFAULTS = ModelDefaults(
    vocab_size=VOCABULARY, bos_token_id=1, eos_token_ids=(7, 8), pad_token_id=0, context_length=4096
)


def test_invalid_values_become_0_and_the_largest_numbers() -> None:
    config = GenerationConfig.resolve({"do_sample": False, "remove_invalid_values": True}, DEFAULTS)
    (processor,) = build_processors(config, np.ones(1, dtype=np.int32))
    largest = np.finfo(np.float32).max
    scores = np.array([[np.inf, -np.inf, np.nan, 1.5]], dtype=np.float32)
    processor(np.ones((1, 1), dtype=np.int32), scores)
    np.testing.assert_array_equal(scores, np.array([[largest, -largest, 0, 1.5]], dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0.7), ("min_p", 0.1), ("typical_p", 0.6), ("epsilon_cutoff", 0.03), ("eta_cutoff", 0.1)],
)
def test_warpers_see_the_same_rows_whole_or_cut_to_candidates(name: str, value: float) -> None:
    """Top-k cuts rows down; every later warper must make the same of the rest as of the whole row."""
    scores = (np.random.default_rng(0).standard_normal((6, VOCABULARY)) * 3).astype(np.float32)
    cut = warp(scores.copy(), [Warping(("top_k", name), (20, value), 1)] * 6)
    scores[scores < np.sort(scores, axis=1)[:, -20:-19]] = -np.inf
    whole = warp(scores, [Warping((name,), (value,), 1)] * 6)
    found = []
    for left in (cut, whole):
        rows, columns = np.nonzero(left.scores > -np.inf)
        found.append((rows, left.token_ids(rows, columns), left.scores[rows, columns]))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_openais_penalties_are_those_of_its_formula_and_leave_the_prompt_out() -> None:
    tokens = np.array([[1, 2, 7, 7, 9, 7], [1, 2, 8, 9, 9, 8]], np.int32)
    scores = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
    penalties: dict[str, Any] = {"presence_penalty": 1.25, "frequency_penalty": 0.5}
    config = dataclasses.replace(GenerationConfig.resolve({"do_sample": False}, DEFAULTS), **penalties)
    for start in (2, 6):  # with four tokens generated, and with none
        expected = scores.copy()
        for row, line in enumerate(tokens[:, start:].tolist()):
            for token in range(12):
                count = line.count(token)
                expected[row, token] -= np.float32(count * 0.5) + np.float32(1.25 if count else 0)
        found = scores.copy()
        (processor,) = build_processors(config, tokens[0, :start])
        processor(tokens, found)
        np.testing.assert_array_equal(found, expected)


def test_processors_follow_the_order_of_transformers() -> None:
    everything = {
        "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "do_sample": False,
        "sequence_bias": [[[3], 1.0]], "repetition_penalty": 1.1, "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[4]], "min_length": 50, "forced_bos_token_id": 5,
        "forced_eos_token_id": 6, "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 1.1],
        "suppress_tokens": [9], "begin_suppress_tokens": [9], "renormalize_logits": True,
    }  # fmt: skip
    config = dataclasses.replace(GenerationConfig.resolve(everything, DEFAULTS), presence_penalty=1.0)
    built = build_processors(config, np.ones(1, dtype=np.int32))
    functions = [getattr(processor, "func", processor) for processor in built]
    assert [getattr(function, "__name__", type(function).__name__) for function in functions] == [
        "SequenceBias", "HammingDiversity", "penalize_repetition", "penalize_occurrences", "ban_repeated_ngrams",
        "ban_repeated_ngrams", "SequenceBias", "ban_tokens", "force_tokens", "force_tokens", "make_finite",
        "favour_the_end", "ban_tokens", "ban_tokens", "renormalize",
    ]  # fmt: skip


def test_what_is_off_is_not_built() -> None:
    config = GenerationConfig.resolve({}, DEFAULTS)
    assert build_processors(config, np.ones(11, dtype=np.int32)) == ()
    assert Warping.of(config).active == ("top_k",)
