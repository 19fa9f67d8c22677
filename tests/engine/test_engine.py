"""Many requests on one model: exact, bounded, cancellable, and back on its feet after a failure."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.engine.errors import EngineStoppedError, RequestTooLargeError
from edge_phi3.llama import DecodeFailedError
from tests.engine.conftest import Asked, MakeModel, ask, generated, running_engine
from tests.golden.attention import FIRST_TOKEN, LAST_TOKEN
from tests.support.services import wait_for

ENDLESS: dict[str, Any] = {"eos_token_id": []}


def prompt(seed: int, length: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(FIRST_TOKEN, LAST_TOKEN, length, dtype=np.int32)


def test_preempted_requests_are_recomputed_and_right(make_model: MakeModel) -> None:
    options = {"max_new_tokens": 90, **ENDLESS}
    prompts = [prompt(seed, 60) for seed in range(8)]
    with running_engine(make_model("4k"), parallel=16) as engine:
        expected = [ask(engine, tokens, **options) for tokens in prompts]
        beams = ask(engine, prompts[0], num_beams=4, num_return_sequences=4, max_new_tokens=40, **ENDLESS)
    with running_engine(make_model("4k"), parallel=16, ctx_size=512) as engine:
        asked = [Asked(engine, tokens, **options) for tokens in prompts]
        searched = Asked(engine, prompts[0], num_beams=4, num_return_sequences=4, max_new_tokens=40, **ENDLESS)
        assert [generated(one.finished()) for one in asked] == expected
        assert generated(searched.finished()) == beams
        assert engine.stats().preemptions_total > 0


@pytest.mark.parametrize(("batch_size", "parallel"), [(1, 16), (1, 1), (16, 16), (17, 255)])
def test_a_batch_has_room_for_every_sequence(make_model: MakeModel, batch_size: int, parallel: int) -> None:
    with running_engine(make_model("4k")) as engine:
        expected = ask(engine, prompt(1, 30), max_new_tokens=8)
    with running_engine(make_model("4k"), batch_size=batch_size, parallel=parallel) as engine:
        assert ask(engine, prompt(1, 30), max_new_tokens=8) == expected


def test_what_never_fits_is_refused_at_once(make_model: MakeModel) -> None:
    with running_engine(make_model("4k"), ctx_size=1024, parallel=16) as engine:
        with pytest.raises(RequestTooLargeError, match=r"1509 KV cells .* has 1024"):
            Asked(engine, prompt(1, 10), max_new_tokens=1500)
        with pytest.raises(RequestTooLargeError, match=r"20 sequences at once; .* at most 16"):
            Asked(engine, prompt(1, 10), num_beams=20, max_new_tokens=5)


def test_an_engine_that_cannot_recover_says_so(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    with running_engine(make_model("4k")) as engine, caplog.at_level(logging.CRITICAL):
        engine.model.runners[0].context.abort()
        with pytest.raises((DecodeFailedError, EngineStoppedError)):
            Asked(engine, prompt(1, 10), max_new_tokens=5).finished()
        assert wait_for(lambda: engine.status == "broken")
        with pytest.raises(EngineStoppedError, match="broken"):
            Asked(engine, prompt(1, 10), max_new_tokens=5)


def test_closing_twice_at_once_frees_the_model_once(make_model: MakeModel) -> None:
    with running_engine(make_model("4k")) as engine:
        asked = Asked(engine, prompt(1, 10), max_new_tokens=3000, **ENDLESS)
        closers = [threading.Thread(target=engine.close) for _ in range(4)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
        with pytest.raises(EngineStoppedError):
            asked.finished()
