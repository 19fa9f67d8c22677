"""Processors and warpers by themselves: order, what is off, and what transformers' recorded answers do not come to."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_phi3.generation import GenerationConfig, ModelDefaults
from edge_phi3.generation.processors import build_processors
from edge_phi3.generation.warpers import Warping

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
