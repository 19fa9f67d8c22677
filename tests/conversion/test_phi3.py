"""config.json becomes hyper-parameters with the meaning that transformers gives them."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.conversion.errors import ConversionError
from edge_phi3.conversion.phi3 import Phi3, read_phi3
from tests.golden.checkpoints import longrope, phi3_tensors

MINI_4K: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
MINI_128K = MINI_4K | {
    "max_position_embeddings": 131072,
    "rope_scaling": longrope(96),
    "sliding_window": 262144,
}
MEDIUM = MINI_4K | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
}


def test_phi3_mini_4k() -> None:
    model = read_phi3(MINI_4K)
    assert (model.head_size, model.sliding_window, model.longrope) == (96, 2047, None)
    assert not model.tie_word_embeddings


def test_entries_that_transformers_does_not_write_have_its_defaults() -> None:
    absent = {"architectures": ["Phi3ForCausalLM"]}
    assert read_phi3(absent) == read_phi3(MINI_4K | {"sliding_window": None})


def test_phi3_mini_128k() -> None:
    model = read_phi3(MINI_128K)
    assert model.longrope is not None
    assert model.longrope.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    np.testing.assert_array_equal(model.longrope.long_factor, np.float32(MINI_128K["rope_scaling"]["long_factor"]))
    np.testing.assert_array_equal(model.longrope.short_factor, np.float32(MINI_128K["rope_scaling"]["short_factor"]))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({"rope_scaling": longrope(96) | {"attention_factor": 1.5}}, 1.5), ({"max_position_embeddings": 4096}, 1.0)],
)
def test_an_attention_factor_is_stated_or_follows_from_the_context(changes: dict[str, Any], factor: float) -> None:
    model = read_phi3(MINI_128K | changes)
    assert model.longrope is not None
    assert model.longrope.attention_factor == factor


@pytest.mark.parametrize("config", [MINI_4K, MEDIUM, MINI_4K | {"tie_word_embeddings": True}])
def test_the_tensors_are_those_of_the_model_class(config: dict[str, Any]) -> None:
    model = read_phi3(config)
    expected = {
        tensor.name: tensor.shape
        for tensor in phi3_tensors(
            model.hidden_size,
            model.intermediate_size,
            model.num_hidden_layers,
            heads=model.num_attention_heads,
            kv_heads=model.num_key_value_heads,
            rows=model.vocab_size,
            gain=1.0,
        )
        if tensor.name != "lm_head.weight" or not model.tie_word_embeddings
    }
    assert {name: spec.shape for name, spec in model.tensors().items()} == expected
    parameters = sum(math.prod(shape) for shape in expected.values())
    assert parameters == {3072: 3_821_079_552, 5120: 13_960_238_080}[model.hidden_size] - (
        32064 * 3072 if model.tie_word_embeddings else 0
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["longrope", "su", "default"]) | JSON,
        "rope_type": JSON,
        "rope_theta": JSON,
        "short_factor": JSON,
        "long_factor": st.just([1.0] * 48) | JSON,
        "attention_factor": JSON,
        "original_max_position_embeddings": JSON,
    },
)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(MINI_4K)), JSON | ROPE, max_size=4), rope=st.none() | ROPE)
def test_no_entry_makes_it_fail_in_another_way(changes: dict[str, Any], rope: dict[str, Any] | None) -> None:
    config = MINI_4K | changes | ({"rope_parameters": rope} if rope is not None else {})
    with contextlib.suppress(ConversionError):
        assert isinstance(read_phi3(config), Phi3)
