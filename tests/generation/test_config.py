"""Merging, types, ranges and combinations of ``generate_kwargs``."""

import dataclasses
import json
from typing import Any

import pytest

from edge_phi3.generation import GenerationConfig, ModelDefaults, ParameterError
from edge_phi3.generation.parameters import PARAMETERS
from edge_phi3.generation.refused import REFUSED
from tests.generation.conftest import DEFAULTS
from tests.golden.generation_data import FOLDER, REPLAY_DEFAULTS, VALIDATION, VALIDATION_PROMPT

VALIDATED: list[tuple[dict[str, Any], str | None]] = json.loads(VALIDATION.read_text())

STRICTER: tuple[dict[str, Any], ...] = (
    # transformers fails on it too, at the last step; this answer had ended before.
    {"forced_eos_token_id": 96},
)
"""What transformers accepts and we refuse."""


def resolve(file: dict[str, Any] | None = None, **requested: Any) -> GenerationConfig:
    defaults = DEFAULTS if file is None else dataclasses.replace(DEFAULTS, generation=file)
    return GenerationConfig.resolve(requested, defaults)


def test_an_empty_request_means_the_defaults_of_the_api() -> None:
    config = resolve()
    assert (config.max_length, config.min_length, config.do_sample, config.early_stopping) == (200, 0, True, False)
    assert (config.num_beams, config.temperature, config.top_k, config.top_p) == (1, 1.0, 10, 1.0)
    assert (config.typical_p, config.repetition_penalty) == (1.0, 1.0)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ((3,), 0, 1)


def test_the_apis_defaults_win_over_the_models_file_and_the_request_over_both() -> None:
    file = {"temperature": 0.5, "top_k": 7, "length_penalty": 2.0, "repetition_penalty": 1.5, "no_such_name": 1}
    config = resolve(file, top_k=3)
    assert (config.temperature, config.repetition_penalty) == (1.0, 1.0)
    assert config.length_penalty == 2.0
    assert config.top_k == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("typical_p", 1.0), ("min_p", None), ("do_sample", False),
        ("repetition_penalty", 1.0), ("min_length", 0), ("max_new_tokens", None), ("bad_words_ids", ()),
        ("eos_token_id", (3,)), ("pad_token_id", 0), ("num_beams", 1), ("early_stopping", False),
        ("length_penalty", 1.0), ("num_return_sequences", 1), ("renormalize_logits", False), ("stop_strings", ()),
        ("max_time", None), ("seed", None), ("forced_bos_token_id", None), ("remove_invalid_values", False),
    ],
)  # fmt: skip
def test_null_means_not_set(name: str, value: object) -> None:
    assert getattr(resolve(**{name: None}), name) == value


def test_a_seed_of_minus_one_is_none() -> None:
    assert resolve(seed=-1).seed is resolve({"seed": -1}).seed is None


def test_null_falls_to_the_models_file_where_transformers_cannot_do_without_a_value() -> None:
    file = {"length_penalty": 0.5, "num_return_sequences": 2, "max_length": 77}
    config = resolve(file, length_penalty=None, num_return_sequences=None, max_length=None)
    assert (config.length_penalty, config.num_return_sequences, config.max_length) == (0.5, 2, 77)


def test_every_parameter_may_be_null() -> None:
    for name in (*PARAMETERS, *REFUSED):
        resolve(**{name: None})


def test_null_max_length_gives_twenty_new_tokens_within_the_context() -> None:
    assert resolve(max_length=None).total_length(9) == 29
    assert resolve(max_length=None).total_length(4090) == 4096
    assert resolve({"max_length": 20}, max_length=None).total_length(9) == 29
    with pytest.raises(ParameterError, match=r"4096 tokens.*4096"):
        resolve(max_length=None).total_length(4096)


def test_max_new_tokens_wins_over_max_length() -> None:
    assert resolve(max_length=3, max_new_tokens=5).total_length(10) == 15


def test_a_prompt_without_room_is_refused_with_both_numbers() -> None:
    with pytest.raises(ParameterError, match=r"`max_length` is 8, .* 9 tokens") as caught:
        resolve(max_length=8).total_length(9)
    assert caught.value.parameter == "max_length"


def test_whole_numbers_are_good_numbers() -> None:
    config = resolve(temperature=2, top_p=1, length_penalty=-1, max_time=3)
    assert (config.temperature, config.top_p, config.length_penalty, config.max_time) == (2.0, 1.0, -1.0, 3.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "1"), ("temperature", True), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", 10**400), ("top_k", 1.0), ("top_k", "3"), ("top_k", False), ("do_sample", 1),
        ("do_sample", "true"), ("max_length", 0), ("max_length", -5), ("max_length", 1.5), ("num_beams", 0),
        ("num_beams", 257), ("num_return_sequences", 0), ("num_return_sequences", 10**9), ("num_beam_groups", 0),
        ("early_stopping", 1), ("early_stopping", "sometimes"), ("bad_words_ids", "x"), ("bad_words_ids", [[1.0]]),
        ("bad_words_ids", [[True]]), ("bad_words_ids", [[1], []]), ("sequence_bias", {"1": 2}),
        ("sequence_bias", [[[1], 2, 3]]), ("sequence_bias", [[[1], None]]), ("eos_token_id", [3, 200]),
        ("eos_token_id", -2), ("eos_token_id", "3"), ("pad_token_id", -1), ("pad_token_id", 200), ("seed", -2),
        ("seed", 2**64), ("seed", 1.0), ("stop_strings", []), ("stop_strings", ""), ("stop_strings", ["a", ""]),
        ("stop_strings", [1]), ("max_time", -1), ("max_time", "1s"), ("exponential_decay_length_penalty", [1.5, 2]),
        ("suppress_tokens", [1.0]), ("forced_bos_token_id", 200), ("forced_eos_token_id", [1, 200]),
        ("no_repeat_ngram_size", -1), ("min_length", -1), ("min_new_tokens", -1), ("top_p", 1.5), ("typical_p", 1.5),
        ("epsilon_cutoff", 1.0), ("eta_cutoff", -0.1), ("output_scores", "yes"),
    ],
)  # fmt: skip
def test_wrong_types_and_ranges_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        resolve(**{name: value})
    assert caught.value.parameter == name
    sentence = str(caught.value)
    assert f"`{name}`" in sentence
    assert "must be ," not in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_value_of_no_kind_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ParameterError, match=rf"^`{name}` must be [a-z].*, but is ") as caught:
        resolve(**{name: {"a": object}})
    assert caught.value.parameter == name


def test_long_values_are_shortened_in_errors() -> None:
    with pytest.raises(ParameterError) as caught:
        resolve(stop_strings=[1] * 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("kwargs", "reason"), VALIDATED, ids=lambda value: json.dumps(value)[:60])
def test_requests_are_refused_where_transformers_refuses_them(kwargs: dict[str, Any], reason: str | None) -> None:
    def accept() -> None:
        GenerationConfig.resolve(kwargs, REPLAY_DEFAULTS).total_length(len(VALIDATION_PROMPT))

    if reason is None and kwargs not in STRICTER:
        accept()
    else:
        with pytest.raises(ParameterError) as caught:
            accept()
        assert caught.value.parameter in kwargs


def test_every_name_of_transformers_is_known() -> None:
    names = set(json.loads((FOLDER / "names.json").read_text())) - {"transformers_version"}
    assert len(names) > 60
    assert names <= PARAMETERS.keys() | REFUSED.keys()
    assert not PARAMETERS.keys() & REFUSED.keys()


@pytest.mark.parametrize(
    ("requested", "sentence"),
    [
        ({"max_token": 3}, "`max_token` is not a generation parameter"),
        ({"presence_penalty": 1.0}, "`presence_penalty` is not a generation parameter"),
        ({"repitition_penalty": 1.1}, "Did you mean `repetition_penalty`"),
        # transformers gives it to the first beam or sequence only.
        ({"encoder_repetition_penalty": 1.2, "num_return_sequences": 2}, "several beams or sequences"),
        *(({name: value}, f"`{name}` is not supported: .{{10}}") for name, value in (
            ("use_cache", False), ("use_cache", 1), ("penalty_alpha", 0.6), ("guidance_scale", 1.5),
            ("force_words_ids", [[1]]), ("watermarking_config", {}),
            ("dola_layers", "low"), ("low_memory", True), ("cache_implementation", "static"), ("constraints", []),
            ("max_matching_ngram_size", 3),
        )),
    ],
)  # fmt: skip
def test_what_is_unknown_or_unsupported_is_refused_with_a_reason(requested: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence) as caught:
        resolve(**requested)
    assert caught.value.parameter in requested


def test_what_is_unsupported_may_ask_for_nothing_and_the_models_file_for_what_does_not_change_tokens() -> None:
    resolve(use_cache=True, penalty_alpha=0.0, guidance_scale=1, low_memory=False, num_assistant_tokens=20)
    resolve({"use_cache": False, "cache_implementation": "static", "transformers_version": "4.39.3"})
    with pytest.raises(ParameterError, match=r"generation_config\.json sets `guidance_scale`"):
        resolve({"guidance_scale": 1.5})
    with pytest.raises(ParameterError, match=r"generation_config\.json: `no_repeat_ngram_size` must be"):
        resolve({"no_repeat_ngram_size": "2"})


def test_a_config_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().top_k = 3  # type: ignore[misc]


def test_model_defaults_need_no_generation_config() -> None:
    bare = ModelDefaults(vocab_size=10, bos_token_id=None, eos_token_ids=(), pad_token_id=None, context_length=64)
    config = GenerationConfig.resolve({}, bare)
    assert config.eos_token_id == ()
    assert config.pad_token_id is None
