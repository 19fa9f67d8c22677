"""Rotary positions in both places of config.json and in every spelling: no factor is lost without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.phi3 import read_phi3
from tests.conversion.test_phi3 import MINI_4K, MINI_128K
from tests.golden.checkpoints import longrope, write_checkpoint

FACTORS = {name: values for name, values in longrope(96).items() if name != "type"}
OTHERS = {name: [value + 1 for value in values] for name, values in FACTORS.items()}
DEFAULT: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
NEW: dict[str, Any] = {**DEFAULT, **FACTORS, "rope_type": "longrope", "original_max_position_embeddings": 4096}
LONG_CONTEXT = MINI_128K | {"rope_scaling": None}
EXPECTED = read_phi3(MINI_128K)

SPELLINGS = [
    {"type": "longrope"},
    {"type": "su"},
    {"type": "yarn"},
    {"rope_type": "longrope"},
    {"rope_type": "su"},
    {"rope_type": "longrope", "type": "longrope"},
    {"rope_type": "longrope", "type": "su"},
    {"rope_type": None, "type": "su"},
    {"rope_type": "longrope", "type": None},
]


def same_as_128k(config: dict[str, Any]) -> tuple[str, ...]:
    """Assert that a config means what Phi-3-mini-128k's means; give what is said of it."""
    model = read_phi3(config)
    assert model.longrope is not None
    assert EXPECTED.longrope is not None
    np.testing.assert_array_equal(model.longrope.short_factor, EXPECTED.longrope.short_factor)
    np.testing.assert_array_equal(model.longrope.long_factor, EXPECTED.longrope.long_factor)
    assert model.longrope.attention_factor == EXPECTED.longrope.attention_factor
    assert (model.rope_theta, model.original_max_position_embeddings) == (10000.0, 4096)
    return model.notes


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
    assert model.rope_theta == 2e4
    model = read_phi3(LONG_CONTEXT | {"rope_parameters": NEW | {"rope_theta": 3e4}})
    assert model.rope_theta == 3e4, "inside goes before beside, as in transformers 5"
    model = read_phi3(LONG_CONTEXT | {"rope_scaling": scaling, "rope_parameters": NEW | {"attention_factor": 1.5}})
    assert model.longrope is not None
    assert model.longrope.attention_factor == 1.5


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
    with pytest.raises(CheckpointError, match=f"{field} must be an object or null"):
        read_phi3(MINI_4K | {field: "longrope", neighbour: DEFAULT})


@pytest.mark.parametrize("kind", [{}, {"type": "default"}, {"rope_type": "default"}], ids=str)
def test_factors_without_their_type_have_no_effect_and_are_told(kind: dict[str, Any]) -> None:
    model = read_phi3(MINI_128K | {"rope_scaling": FACTORS | kind})
    assert model.longrope is None
    assert model.notes == tuple(
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
