"""Every number that a request may give at its extremes, in every combination of two: refused by name, or harmless."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from edge_phi3.errors import InternalError
from edge_phi3.generation import Decoder, GenerationConfig, ParameterError, advance, make_decoder
from edge_phi3.generation.parameters import OPENAI_PARAMETERS, PARAMETERS
from tests.generation.conftest import DEFAULTS, VOCABULARY, table_model
from tests.support.cases import tables

PROMPT = np.array([5, 6, 7], np.int32)
LOGITS = table_model(1)((5, 6, 7))
INTEGERS = (0, 2**31, 2**63, -1, 1, 199, 200, 2**64 - 1, 10**30, -(2**63))
NUMBERS = (*INTEGERS, 1e-45, 1e-38, 5e-324, 1e38, 1e308, -1e38, 0.5, 1 - 2**-53, -0.0, math.nan, math.inf, -math.inf)
PAIRED = {0, 2**31, 2**63, 1e-45, 1e-38, 5e-324, 1e38, 1e308, -1e38}
OPTIONS = [
    *((name, value) for name, each in (PARAMETERS | OPENAI_PARAMETERS).items() for value in NUMBERS
      if each.value.kind.type in {int, float}),
    *((name, value) for name in ("forced_bos_token_id", "forced_eos_token_id", "eos_token_id", "pad_token_id")
      for value in INTEGERS),
    *((name, [value]) for name in ("suppress_tokens", "begin_suppress_tokens", "eos_token_id") for value in INTEGERS),
    *(("eos_token_id", ends) for ends in ([3] * 999, [*range(200)], [*range(200)] * 2)),
    *(("bad_words_ids", [[9, value]]) for value in INTEGERS),
    *(("sequence_bias", [[[9], value]]) for value in NUMBERS),
    *(("exponential_decay_length_penalty", pair) for value in NUMBERS for pair in ([value, 1.5], [1, value])),
]  # fmt: skip
WAYS: Mapping[str, dict[str, Any]] = tables(__file__)["WAYS"]


def decoder_of(options: Mapping[str, Any]) -> Decoder | None:
    """Return what a request is answered by, None for one that is refused by an option's name."""
    read = {name: OPENAI_PARAMETERS[name] for name in options.keys() & OPENAI_PARAMETERS}
    try:
        replaced = {name: each.read(name, options[name]) for name, each in read.items()}
        config = GenerationConfig.resolve({name: options[name] for name in options.keys() - read}, DEFAULTS)
        if config.is_beam_search:
            replaced.pop("top_logprobs", None)  # which the API refuses
        return make_decoder(dataclasses.replace(config, **replaced), PROMPT)
    except ParameterError as error:
        refused = error
    assert refused.parameter in PARAMETERS | OPENAI_PARAMETERS
    assert len(str(refused)) < 300
    return None


def number_of(option: Any) -> Any:
    """Return the last number in an option."""
    return number_of(option[-1]) if isinstance(option, list) else option


@pytest.mark.parametrize("way", WAYS)
def test_numbers_at_their_extremes_are_refused_by_name_or_harm_nobody(way: str) -> None:
    taken = [(name, value) for name, value in OPTIONS if decoder_of(WAYS[way] | {name: value}) is not None]
    assert 100 < len(taken) < len(OPTIONS) * 2 / 3
    told = [option for option in taken if number_of(option[1]) in PAIRED]
    pairs = [WAYS[way] | dict(pair) for pair in itertools.combinations(told, 2) if pair[0][0] != pair[1][0]]
    # What is one option's fault shows in every way; beams take longer.
    pairs = pairs[:: 3 if "num_beams" in WAYS[way] else 1] + [WAYS[way] | dict([option]) for option in taken]
    running = [(pair, decoder) for pair in pairs if (decoder := decoder_of(pair)) is not None]
    for _ in range(2):
        running = [(pair, decoder) for pair, decoder in running if not decoder.finished]
        for begin in range(0, len(running), 64):
            together = [decoder for _, decoder in running[begin : begin + 64]]
            advance(together, np.tile(LOGITS, (sum(decoder.rows for decoder in together), 1)))
        broken = [pair for pair, decoder in running if isinstance(decoder.error, InternalError)]
        assert not broken, broken[:3]
        assert all(0 <= token < VOCABULARY for _, each in running if not each.finished for token in each.last_tokens())
