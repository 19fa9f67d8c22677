"""When streamed tokens are delivered."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from edge_phi3.engine.events import EventBatcher, Mailbox
from edge_phi3.engine.sequence import TokensEvent


async def _deliveries(interval: float, step: float, steps: int) -> list[tuple[float, int]]:
    """Return the times of the deliveries of a stream, and how many tokens each had, by a clock of steps."""
    now = 1000.0
    outbox, mailbox = EventBatcher(interval, lambda: now), Mailbox()
    outbox.flush()
    outbox.flush_if_due()
    loop = asyncio.get_running_loop()
    found: list[tuple[float, int]] = []
    for number in range(1, steps + 1):
        now = 1000.0 + number * step
        outbox.post(loop, mailbox, TokensEvent([(0, number)]))
        outbox.flush_if_due()
        await asyncio.sleep(0)
        while not mailbox.empty():
            event = mailbox.get_nowait()
            assert isinstance(event, TokensEvent)
            found.append((now, len(event.tokens)))
    return found


@pytest.mark.parametrize("step", [0.003, 0.011, 0.03, 0.049])
def test_a_token_waits_for_no_longer_than_the_interval(step: float) -> None:
    found = asyncio.run(_deliveries(0.1, step, 200))
    apart = [later - earlier for (earlier, _), (later, _) in pairwise(found)]
    assert max(apart) <= 0.1 + 1e-9
    assert min(apart) > 0.1 - step - 1e-9
    assert all(tokens == round(seconds / step) for seconds, (_, tokens) in zip(apart, found[1:], strict=True))


@pytest.mark.parametrize(("interval", "step"), [(0.1, 0.06), (0.1, 0.5), (0.0, 0.001)])
def test_no_token_waits_where_steps_are_slow_or_waiting_is_switched_off(interval: float, step: float) -> None:
    assert [tokens for _, tokens in asyncio.run(_deliveries(interval, step, 50))] == [1] * 50


def test_what_is_urgent_takes_along_what_waits() -> None:
    async def post() -> None:
        now = 1000.0
        outbox, mailbox, other = EventBatcher(10.0, lambda: now), Mailbox(), Mailbox()
        outbox.flush()
        outbox.flush_if_due()
        loop = asyncio.get_running_loop()
        outbox.post(loop, mailbox, TokensEvent([(0, 1)]))
        now = 1000.01
        outbox.flush_if_due()
        await asyncio.sleep(0)
        assert mailbox.empty()
        failure = ValueError("over")
        outbox.post(loop, other, failure)
        now = 1000.02
        outbox.flush_if_due()
        await asyncio.sleep(0)
        assert mailbox.get_nowait() == TokensEvent([(0, 1)])
        assert other.get_nowait() is failure

    asyncio.run(post())
