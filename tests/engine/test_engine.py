"""Many requests on one model: exact, bounded, back after a failure; scored prompts, sizes of batches, delivery."""

import asyncio
import logging
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from edge_phi3.engine.batch_sizes import BatchSizes, measure
from edge_phi3.engine.errors import EngineStoppedError, RequestTooLargeError
from edge_phi3.engine.events import EventBatcher, Mailbox
from edge_phi3.engine.sequence import Event, TokensEvent
from edge_phi3.llama import DecodeFailedError
from tests.golden.attention import FIRST_TOKEN, LAST_TOKEN
from tests.support.cases import cases
from tests.support.engines import Asked, MakeModel, ask, generated, running_engine
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


def test_a_batch_has_room_for_every_sequence(make_model: MakeModel) -> None:
    answers = []
    for batch_size, parallel in ((512, 16), (1, 16), (1, 1), (16, 16), (17, 255)):
        with running_engine(make_model("4k"), batch_size=batch_size, parallel=parallel) as engine:
            answers.append(ask(engine, prompt(1, 30), max_new_tokens=8))
    assert answers[1:] == answers[:-1]


def test_what_never_fits_is_refused_at_once(make_model: MakeModel) -> None:
    with running_engine(make_model("4k"), ctx_size=1024, parallel=16) as engine:
        with pytest.raises(RequestTooLargeError, match=r"1509 KV cells .* has 1024"):
            Asked(engine, prompt(1, 10), max_new_tokens=1500)
        with pytest.raises(RequestTooLargeError, match=r"20 sequences at once; .* at most 16"):
            Asked(engine, prompt(1, 10), num_beams=20, max_new_tokens=5)


def test_at_rest_memory_is_given_back(make_model: MakeModel) -> None:
    process = psutil.Process()
    with running_engine(make_model("4k")) as engine:
        blocks = [b"x" * 100_000 for _ in range(3000)]
        del blocks[:-1]  # the last one keeps the C library from it
        held = process.memory_info().rss
        ask(engine, prompt(1, 10), max_new_tokens=5)
        assert wait_for(lambda: process.memory_info().rss < held - 200_000_000)


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


MEASURED = {1: 17, 2: 29, 3: 39, 4: 42, 6: 64, 7: 74, 8: 104, 12: 123, 15: 144, 16: 127, 24: 207, 32: 228}
"""Milliseconds of a 0.65 B model at Q4_K_M on two cores with AVX2."""


def test_rows_are_filled_up_and_go_in_two_batches_where_that_is_faster() -> None:
    sizes, unknown = BatchSizes(MEASURED), BatchSizes({})
    assert [sizes.padding(rows) for rows in (3, 4, 12, 14, 15, 16, 33)] == [0, 0, 0, 2, 1, 0, 0]
    assert [sizes.first(rows) for rows in (1, 2, 4, 7, 8, 16, 40)] == [1, 2, 4, 7, 4, 16, 40]
    assert (unknown.padding(3), unknown.first(3)) == (0, 3), "what was not measured is decoded as it comes"


def test_a_context_is_measured_and_left_empty(make_model: MakeModel) -> None:
    with running_engine(make_model("4k"), parallel=6) as engine:
        context = engine.model.runners[0].context
        engine._core.stop("It is measured.")  # type: ignore[union-attr]
        sizes = measure(context)
        assert sizes._largest <= 6
        assert context.position_range(0) == (-1, -1)


class Deliveries:
    """What is posted on a clock of its own, and delivered after each step."""

    def __init__(self, interval: float) -> None:
        self.now = 1000.0
        self.outbox = EventBatcher(interval, lambda: self.now)
        self.outbox.flush()
        self.outbox.flush_if_due()

    async def post(self, mailbox: Mailbox, event: Event, seconds: float) -> None:
        self.now += seconds
        self.outbox.post(asyncio.get_running_loop(), mailbox, event)
        self.outbox.flush_if_due()
        await asyncio.sleep(0)


async def _deliveries(interval: float, step: float, steps: int) -> list[tuple[float, int]]:
    """Return the times of the deliveries of a stream, and how many tokens each had."""
    deliveries, mailbox, found = Deliveries(interval), Mailbox(), list[tuple[float, int]]()
    for number in range(1, steps + 1):
        await deliveries.post(mailbox, TokensEvent([(0, number)]), step)
        while not mailbox.empty():
            event = mailbox.get_nowait()
            assert isinstance(event, TokensEvent)
            found.append((deliveries.now, len(event.tokens)))
    return found


@pytest.mark.parametrize("step", [0.003, 0.011, 0.03, 0.049])
def test_a_token_waits_for_no_longer_than_the_interval(step: float) -> None:
    found = asyncio.run(_deliveries(0.1, step, 200))
    apart = [later - earlier for (earlier, _), (later, _) in pairwise(found)]
    assert max(apart) <= 0.1 + 1e-9
    assert min(apart) > 0.1 - step - 1e-9
    assert all(tokens == round(seconds / step) for seconds, (_, tokens) in zip(apart, found[1:], strict=True))
    # Where steps are slow, or waiting is switched off, no token waits.
    for interval, long in ((0.1, 0.06), (0.1, 0.5), (0.0, 0.001)):
        assert [tokens for _, tokens in asyncio.run(_deliveries(interval, long, 50))] == [1] * 50


def test_what_is_urgent_takes_along_what_waits() -> None:
    async def post() -> None:
        deliveries, mailbox, other, failure = Deliveries(10.0), Mailbox(), Mailbox(), ValueError("over")
        await deliveries.post(mailbox, TokensEvent([(0, 1)]), 0.01)
        assert mailbox.empty()
        await deliveries.post(other, failure, 0.01)
        assert mailbox.get_nowait() == TokensEvent([(0, 1)])
        assert other.get_nowait() is failure

    asyncio.run(post())
