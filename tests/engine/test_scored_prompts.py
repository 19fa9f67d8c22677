"""The log-probabilities of prompts on real models: in the window and beyond it, with both sets of rotary factors."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.conftest import Asked, MakeModel, running_engine
from tests.golden.attention import FIRST_TOKEN, LAST_TOKEN
from tests.support.cases import cases


@cases
@pytest.mark.parametrize("options", [{}, {"batch_size": 48, "parallel": 2, "exact_seeds": True}])
def test_each_is_what_the_tokens_before_give(
    make_model: MakeModel, model: str, length: int, places: tuple[int, ...], options: dict[str, int]
) -> None:
    prompt = np.random.default_rng(length).integers(FIRST_TOKEN, LAST_TOKEN, length, dtype=np.int32)
    with running_engine(make_model(model), **options) as engine:
        size = engine.model.model.vocab_size
        beside = Asked(engine, prompt[:50], max_new_tokens=60, eos_token_id=[])
        scored = Asked(engine, prompt, scored_prompt=3, max_new_tokens=1, seed=1).finished().prompt_logprobs
        assert [each.token_id for each in scored] == prompt[1:].tolist()
        for place in places:
            event = Asked(engine, prompt[:place], max_new_tokens=1, top_logprobs=size).finished()
            assert event.result.logprobs is not None
            ((right,),) = event.result.logprobs
            found, every = scored[place - 1], dict(right.top)
            assert found.logprob == pytest.approx(every[found.token_id], abs=1e-4)
            assert [logprob for _, logprob in found.top] == pytest.approx([each for _, each in right.top[:3]], abs=1e-4)
        assert len(beside.finished().result.sequences[0]) == 110
