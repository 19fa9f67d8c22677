"""config.json becomes hyper-parameters with the meaning that transformers gives them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.errors import CheckpointError, ConversionError, UnsupportedModelError
from edge_phi3.conversion.phi3 import Phi3, read_phi3
from tests.golden.checkpoints import longrope, phi3_tensors, write_checkpoint

MINI_4K: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": None, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "vocab_size": 32064,
}  # fmt: skip
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


def test_entries_that_transformers_does_not_write_have_its_defaults() -> None:
    absent = {"architectures": ["Phi3ForCausalLM"]}
    assert read_phi3(absent) == read_phi3(MINI_4K | {"sliding_window": None})


def test_phi3_mini_128k() -> None:
    model = read_phi3(MINI_128K)
    assert model.rope.longrope is not None
    assert model.rope.longrope.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))
    for name in ("long_factor", "short_factor"):
        np.testing.assert_array_equal(getattr(model.rope.longrope, name), np.float32(MINI_128K["rope_scaling"][name]))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({"rope_scaling": longrope(96) | {"attention_factor": 1.5}}, 1.5), ({"max_position_embeddings": 4096}, 1.0)],
)
def test_an_attention_factor_is_stated_or_follows_from_the_context(changes: dict[str, Any], factor: float) -> None:
    model = read_phi3(MINI_128K | changes)
    assert model.rope.longrope is not None
    assert model.rope.longrope.attention_factor == factor


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
            kv_heads=model.kv_heads,
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


FACTORS = {name: values for name, values in longrope(96).items() if name != "type"}
OTHERS = {name: [value + 1 for value in values] for name, values in FACTORS.items()}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
NEW: dict[str, Any] = {**DEFAULT, **FACTORS, "rope_type": "longrope", "original_max_position_embeddings": 4096}
LONG_CONTEXT = MINI_128K | {"rope_scaling": None}
EXPECTED = read_phi3(MINI_128K)

SPELLINGS = [
    {"type": "longrope"},
    {"type": "yarn"},
    {"rope_type": "longrope", "type": "su"},
    {"rope_type": None, "type": "su"},
    {"rope_type": "longrope", "type": None},
]


def same_as_128k(config: dict[str, Any]) -> tuple[str, ...]:
    """Assert that a config means what Phi-3-mini-128k's means; give what is said of it."""
    model = read_phi3(config)
    found, expected = model.rope.longrope, EXPECTED.rope.longrope
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.short_factor, expected.short_factor)
    np.testing.assert_array_equal(found.long_factor, expected.long_factor)
    assert found.attention_factor == expected.attention_factor
    assert (model.rope.theta, model.rope.original_context) == (10000.0, 4096)
    return model.rope.notes


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("other", [None, {}, DEFAULT, {"type": "default"}, {"rope_theta": 10000.0}], ids=str)
def test_the_factors_of_either_place_count(field: str, spelling: dict[str, Any], other: dict[str, Any] | None) -> None:
    neighbour = {"rope_scaling": "rope_parameters", "rope_parameters": "rope_scaling"}[field]
    notes = same_as_128k(LONG_CONTEXT | {field: FACTORS | spelling, neighbour: other})
    if other:
        assert notes == (
            f"config.json: {field} has the factors of longrope and {neighbour} the type 'default'; "
            "the factors are kept.",
        )
    else:
        assert notes == ()


def test_both_places_may_say_the_same() -> None:
    assert same_as_128k(LONG_CONTEXT | {"rope_scaling": {"type": "su"} | FACTORS, "rope_parameters": NEW}) == ()
    # Whole numbers and floats are the same numbers.
    scaling = {"type": "longrope", "rope_theta": 10000} | FACTORS
    assert same_as_128k(LONG_CONTEXT | {"rope_scaling": scaling, "rope_parameters": NEW}) == ()


@pytest.mark.parametrize(
    ("scaling", "parameters", "entry"),
    [
        ({"type": "longrope"} | OTHERS, NEW, "short_factor"),
        ({"type": "longrope"} | FACTORS, NEW | {"long_factor": OTHERS["long_factor"]}, "long_factor"),
        ({"type": "longrope"} | FACTORS, NEW | {"rope_theta": 20000.0}, "rope_theta"),
        ({"type": "longrope"} | FACTORS, DEFAULT | {"rope_theta": 20000.0}, "rope_theta"),
        ({"type": "default", "rope_theta": 20000.0}, NEW, "rope_theta"),
        ({"type": "longrope"} | FACTORS, NEW | {"original_max_position_embeddings": 8192}, "original_max_position"),
        ({"type": "longrope"} | FACTORS, DEFAULT | {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        (
            {"type": "longrope", "attention_factor": 1.5} | FACTORS,
            NEW | {"attention_factor": 1.25},
            "attention_factor",
        ),
    ],
)
def test_places_that_contradict_each_other_are_refused(
    scaling: dict[str, Any], parameters: dict[str, Any], entry: str
) -> None:
    config = LONG_CONTEXT | {"partial_rotary_factor": 1.0, "rope_scaling": scaling, "rope_parameters": parameters}
    with pytest.raises(
        CheckpointError,
        match=f"^config.json: rope_scaling and rope_parameters contradict each other on {entry}.*; remove the one",
    ):
        read_phi3(config)


def test_an_entry_that_stands_in_one_place_counts() -> None:
    nothing_beside = {name: value for name, value in LONG_CONTEXT.items() if name != "rope_theta"}
    scaling = {"type": "longrope"} | FACTORS
    model = read_phi3(nothing_beside | {"rope_scaling": scaling, "rope_parameters": DEFAULT | {"rope_theta": 2e4}})
    assert model.rope.theta == 2e4
    model = read_phi3(LONG_CONTEXT | {"rope_parameters": NEW | {"rope_theta": 3e4}})
    assert model.rope.theta == 3e4, "inside goes before beside, as in transformers 5"
    model = read_phi3(LONG_CONTEXT | {"rope_scaling": scaling, "rope_parameters": NEW | {"attention_factor": 1.5}})
    assert model.rope.longrope is not None
    assert model.rope.longrope.attention_factor == 1.5


def test_one_place_with_two_types_is_refused() -> None:
    rope = {"rope_type": "default", "type": "longrope"} | FACTORS
    with pytest.raises(CheckpointError, match="rope_scaling has the rope_type 'default' and the type 'longrope'; give"):
        read_phi3(MINI_128K | {"rope_scaling": rope})


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_a_type_that_phi3_has_not_is_refused_wherever_it_stands(field: str) -> None:
    neighbour = {"rope_scaling": "rope_parameters", "rope_parameters": "rope_scaling"}[field]
    for kind in ("llama3", 7, ["longrope"]):
        config = LONG_CONTEXT | {field: {"rope_type": kind, "factor": 8.0}, neighbour: {"type": "longrope"} | FACTORS}
        with pytest.raises(UnsupportedModelError, match=f"{field}: the rope scaling type is .*Phi-3 has 'longrope'"):
            read_phi3(config)
    with pytest.raises(CheckpointError, match=rf"{field}: expected `object \| null`, got `str`"):
        read_phi3(MINI_4K | {field: "longrope", neighbour: DEFAULT})


@pytest.mark.parametrize("kind", [{}, {"type": "default"}, {"rope_type": "default"}], ids=str)
def test_factors_without_their_type_have_no_effect_and_are_told(kind: dict[str, Any]) -> None:
    model = read_phi3(MINI_128K | {"rope_scaling": FACTORS | kind})
    assert model.rope.longrope is None
    assert model.rope.notes == tuple(
        f"config.json: rope_scaling has a {name}, but its type is not 'longrope'; as in transformers, it has no effect."
        for name in ("short_factor", "long_factor")
    )


def test_the_file_is_that_of_the_factors_alone_and_the_converter_says_so(
    tmp_path: Path, edit: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(
        tmp_path / "phi-3-long", layers=1, max_position_embeddings=131072, rope_scaling=longrope(16)
    )
    alone = convert(folder, tmp_path / "alone.gguf").path.read_bytes()
    assert caplog.messages == []
    edit(folder / "config.json", rope_parameters=DEFAULT)
    assert convert(folder, tmp_path / "both.gguf").path.read_bytes() == alone
    (told,) = caplog.messages
    assert "rope_scaling has the factors of longrope and rope_parameters the type 'default'" in told
