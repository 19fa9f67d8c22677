"""Merging, types, ranges and combinations of ``generate_kwargs``."""

import dataclasses
import json
from typing import Any

import pytest

from edge_phi3.generation import GenerationConfig, ModelDefaults, ParameterError
from edge_phi3.generation.parameters import PARAMETERS
from edge_phi3.generation.values import REFUSED
from tests.generation.conftest import DEFAULTS
from tests.golden.generation_data import FOLDER, REPLAY_DEFAULTS, VALIDATION, VALIDATION_PROMPT
from tests.support.cases import cases

VALIDATED: list[tuple[dict[str, Any], str | None]] = json.loads(VALIDATION.read_text())

STRICTER = {"forced_eos_token_id": 96}
"""What transformers accepts and we refuse: it fails on it too, at the last step; this answer had ended before."""


def resolve(file: dict[str, Any] | None = None, **requested: Any) -> GenerationConfig:
    defaults = DEFAULTS if file is None else dataclasses.replace(DEFAULTS, generation=file)
    return GenerationConfig.resolve(requested, defaults)


@cases
def test_what_a_request_comes_to(file: dict[str, Any] | None, requested: dict[str, Any], expected: Any) -> None:
    config = resolve(file, **requested)
    assert json.loads(json.dumps({name: getattr(config, name) for name in expected})) == expected


@cases
def test_how_long_an_answer_may_be(file: Any, requested: dict[str, Any], prompt: int, total: object) -> None:
    if isinstance(total, int):
        assert resolve(file, **requested).total_length(prompt) == total
    else:
        with pytest.raises(ParameterError, match=str(total)) as caught:
            resolve(file, **requested).total_length(prompt)
        assert caught.value.parameter == "max_length"


@cases
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
        resolve(**{name: {"a": [object] * 10_000}})
    assert caught.value.parameter == name
    assert len(str(caught.value)) < 300, "long values are shortened"


@pytest.mark.parametrize(("kwargs", "reason"), VALIDATED, ids=lambda value: json.dumps(value)[:60])
def test_requests_are_refused_where_transformers_refuses_them(kwargs: dict[str, Any], reason: str | None) -> None:
    def accept() -> None:
        GenerationConfig.resolve(kwargs, REPLAY_DEFAULTS).total_length(len(VALIDATION_PROMPT))

    if reason is None and kwargs != STRICTER:
        accept()
    else:
        with pytest.raises(ParameterError) as caught:
            accept()
        assert caught.value.parameter in kwargs


def test_every_name_of_transformers_is_known_and_may_be_null() -> None:
    names = set(json.loads((FOLDER / "names.json").read_text())) - {"transformers_version"}
    assert len(names) > 60
    assert names <= PARAMETERS.keys() | REFUSED.keys()
    for name in (*PARAMETERS, *REFUSED):
        resolve(**{name: None})
    assert not PARAMETERS.keys() & REFUSED.keys()


@cases
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


def test_a_config_is_immutable_and_needs_no_generation_config() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().top_k = 3  # type: ignore[misc]
    bare = ModelDefaults(vocab_size=10, bos_token_id=None, eos_token_ids=(), pad_token_id=None, context_length=64)
    config = GenerationConfig.resolve({}, bare)
    assert (config.eos_token_id, config.pad_token_id) == ((), None)
