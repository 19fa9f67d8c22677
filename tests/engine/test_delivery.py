"""When streamed tokens are delivered."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from edge_phi3.engine.delivery import Mailbox, Outbox
from edge_phi3.engine.sequence import TokensEvent


async def _deliveries(interval: float, step: float, steps: int) -> list[tuple[float, int]]:
    """Give the times of the deliveries of a stream, and how many tokens each had, by a clock of steps."""
    outbox, mailbox = Outbox(interval), Mailbox()
    loop = asyncio.get_running_loop()
    found: list[tuple[float, int]] = []
    outbox._flushed = outbox._asked = 1000.0
    for number in range(1, steps + 1):
        now = 1000.0 + number * step
        outbox.post(loop, mailbox, TokensEvent([(0, number)]))
        if outbox.is_due(now):
            outbox.flush()
            outbox._flushed = now
            await asyncio.sleep(0)
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
    asyncio.run(_urgent())


async def _urgent() -> None:
    outbox, mailbox, other = Outbox(10.0), Mailbox(), Mailbox()
    loop = asyncio.get_running_loop()
    outbox._flushed = outbox._asked = 1000.0
    outbox.post(loop, mailbox, TokensEvent([(0, 1)]))
    assert not outbox.is_due(1000.01)
    failure = ValueError("over")
    outbox.post(loop, other, failure)
    assert outbox.is_due(1000.02)
    outbox.flush_if_due(1000.02)
    await asyncio.sleep(0)
    assert mailbox.get_nowait() == TokensEvent([(0, 1)])
    assert other.get_nowait() is failure
