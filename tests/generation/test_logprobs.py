"""Log-probabilities are those of the model's own logits, whatever is done to them before a token is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_phi3.generation import advance
from tests.generation.conftest import VOCABULARY, answer, decoder, table_model

PROMPT = (5, 6, 7)
MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "suppress_tokens": list(range(0, 200, 2)), "return_dict_in_generate": True},
    {"seed": 1, "temperature": 0.5, "top_k": 3},
    {"seed": 2, "num_return_sequences": 3, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.3},
    {"do_sample": None, "num_return_sequences": 2},
]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("top", [0, 1, 5, VOCABULARY + 1])
def test_they_are_the_log_softmax_of_the_raw_logits(options: dict[str, Any], top: int) -> None:
    model, options = table_model(1), {"max_new_tokens": 12} | options
    result, plain = (answer(model, PROMPT, **more, **options) for more in ({"top_logprobs": top}, {}))
    assert [s.tolist() for s in result.sequences] == [s.tolist() for s in plain.sequences]
    assert plain.logprobs is None
    assert result.logprobs is not None
    for sequence, recorded in zip(result.sequences, result.logprobs, strict=True):
        tokens = sequence.tolist()
        assert [logprobs.token_id for logprobs in recorded] == tokens[len(PROMPT) :]
        for place, logprobs in enumerate(recorded, len(PROMPT)):
            logits = model(tuple(tokens[:place])).astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum())
            assert logprobs.logprob == pytest.approx(expected[tokens[place]], abs=1e-9)
            best = np.argsort(-expected, kind="stable")[:top].tolist()
            assert [token for token, _ in logprobs.top] == best
            assert [logprob for _, logprob in logprobs.top] == pytest.approx(expected[best].tolist(), abs=1e-9)


def test_steps_hold_them_beside_what_they_emit_and_of_equal_tokens_the_lower_ids_come_first() -> None:
    each, other = decoder(PROMPT, do_sample=False, top_logprobs=3), decoder(PROMPT, do_sample=False)
    logits = np.zeros((2, VOCABULARY), np.float32)
    logits[:, [9, 40]] = 2
    first, second = advance([each, other], logits)
    assert [(0, first.logprobs[0].token_id)] == list(first.emitted) == list(second.emitted) == [(0, 9)]
    assert [token for token, _ in first.logprobs[0].top] == [9, 40, 0]
    assert list(second.logprobs) == []


def test_a_request_that_fails_has_none() -> None:
    each = decoder(PROMPT, top_logprobs=1, seed=1)
    (step,) = advance([each], np.full((1, VOCABULARY), np.nan, np.float32))
    assert each.error is not None
    assert list(step.logprobs) == []
