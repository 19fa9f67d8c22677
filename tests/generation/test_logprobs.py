"""Log-probabilities are those of the model's own logits, whatever is done to them before a token is chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from edge_phi3.generation import Decoder, GenerationConfig, advance, make_decoder
from edge_phi3.generation.logprobs import _likeliest
from tests.generation.conftest import DEFAULTS, decoder, run, table_model

PROMPT = (5, 6, 7)
MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "suppress_tokens": list(range(0, 200, 2)), "return_dict_in_generate": True},
    {"seed": 1, "temperature": 0.5, "top_k": 3},
    {"seed": 2, "num_return_sequences": 3, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.3},
    {"do_sample": None, "num_return_sequences": 2},
]


def watched(top: int, **options: Any) -> Decoder:
    config = GenerationConfig.resolve({"max_new_tokens": 12} | options, DEFAULTS)
    return make_decoder(dataclasses.replace(config, top_logprobs=top), np.array(PROMPT, np.int32))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("top", [0, 1, 5])
def test_they_are_the_log_softmax_of_the_raw_logits(options: dict[str, Any], top: int) -> None:
    model = table_model(1)
    each, plain = watched(top, **options), decoder(PROMPT, max_new_tokens=12, **options)
    run(model, (each, PROMPT), (plain, PROMPT))
    result = each.result()
    assert [s.tolist() for s in result.sequences] == [s.tolist() for s in plain.result().sequences]
    assert plain.result().logprobs is None
    assert result.logprobs is not None
    for sequence, told in zip(result.sequences, result.logprobs, strict=True):
        tokens = sequence.tolist()
        assert [logprobs.token_id for logprobs in told] == tokens[len(PROMPT) :]
        for place, logprobs in enumerate(told, len(PROMPT)):
            logits = model(tuple(tokens[:place])).astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum())
            assert logprobs.logprob == pytest.approx(expected[tokens[place]], abs=1e-9)
            best = np.argsort(-expected, kind="stable")[:top].tolist()
            assert [token for token, _ in logprobs.top] == best
            assert [logprob for _, logprob in logprobs.top] == pytest.approx(expected[best].tolist(), abs=1e-9)


def test_steps_tell_them_beside_what_they_emit() -> None:
    model = table_model(2)
    each, other = watched(2, do_sample=False), decoder(PROMPT, do_sample=False)
    first, second = advance([each, other], np.stack([model(PROMPT)] * 2))
    assert [(0, first.logprobs[0].token_id)] == list(first.emitted) == list(second.emitted)
    assert len(first.logprobs[0].top) == 2
    assert list(second.logprobs) == []


def test_of_equal_tokens_the_lower_ids_come_first() -> None:
    row = np.array([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    assert _likeliest(row, 4) == ((1, 2.0), (3, 2.0), (2, 1.0), (4, 1.0))
    assert len(_likeliest(row, 20)) == 6


def test_a_request_that_fails_tells_of_no_token() -> None:
    each = watched(1, seed=1)
    (step,) = advance([each], np.full((1, 200), np.nan, np.float32))
    assert each.error is not None
    assert list(step.logprobs) == []


def test_beam_searches_have_none() -> None:
    with pytest.raises(ValueError, match="Beam searches"):
        watched(1, num_beams=2)
