"""A step that does not come back is noticed, reported and, in the end, not waited for."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from edge_phi3.engine.engine import Engine
from edge_phi3.engine.errors import EngineStoppedError
from edge_phi3.engine.watchdog import Watchdog, stacks
from edge_phi3.errors import InternalError
from tests.engine.test_engine import ENDLESS, prompt
from tests.support.cases import tables
from tests.support.engines import Asked, MakeModel, ask, running_engine
from tests.support.services import wait_for

STALL, RECOVERY, LOSS = "stalled", "recovered", "lost"
STORIES: dict[str, list[tuple[str, float, list[str]]]] = tables(__file__)["STORIES"]
"""What happens at first, the seconds that it lasts, and what the watchdog calls meanwhile; its limit is 60 seconds."""


@pytest.mark.parametrize("story", STORIES)
def test_a_watchdog_on_a_clock_of_its_own(story: str) -> None:
    now, steps, busy = 0.0, 0, True
    calls: list[str] = []
    watchdog = Watchdog(
        60.0,
        steps=lambda: steps if busy else None,
        stalled=lambda _: calls.append(STALL),
        recovered=lambda: calls.append(RECOVERY),
        lost=lambda: calls.append(LOSS),
        clock=lambda: now,
    )
    for kind, seconds, expected in STORIES[story]:
        calls.clear()
        busy = kind != "idle"
        steps += kind == "step"
        looks = 1 if kind == "sleep" else round(seconds)
        for _ in range(looks):
            now += seconds / looks
            watchdog.look()
        assert calls == expected, (kind, seconds)


def test_the_stacks_tell_where_each_thread_is() -> None:
    told = stacks()
    assert "test_the_stacks_tell_where_each_thread_is" in told
    assert "Thread MainThread" in told


def _stuck(engine: Engine) -> threading.Event:
    """Let the engine's thread stand still in its next decode call, until the event is set."""
    context, go = engine.model.runners[0].context, threading.Event()
    decode = context.decode

    def never(*arguments: Any) -> Any:
        go.wait()
        return decode(*arguments)

    context.decode = never  # type: ignore[method-assign,assignment]
    return go


def _status(engine: Engine) -> str:
    """Return its status now; for type checkers an attribute stays what an assertion has found."""
    return engine.status


def _hours(engine: Engine) -> Callable[[int], None]:
    """Return a function that lets the watchdog look now and every ten minutes of some hours, which pass at once."""
    watchdog = engine._watchdog
    assert watchdog is not None
    now = [time.monotonic()]
    watchdog._clock = lambda: now[0]

    def look(hours: int) -> None:
        watchdog.look()
        for _ in range(6 * hours):
            now[0] += 600
            watchdog.look()

    return look


def test_requests_of_a_stalled_engine_fail_and_it_goes_on_when_the_step_comes(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    with running_engine(make_model("4k"), stall_timeout=36_000.0) as engine:
        expected = ask(engine, prompt(1, 20), max_new_tokens=5, **ENDLESS)
        go = _stuck(engine)
        with caplog.at_level(logging.CRITICAL, "edge_phi3"):
            asked = Asked(engine, prompt(1, 20), max_new_tokens=5, **ENDLESS)
            assert wait_for(lambda: engine.stats().running == 1)
            look = _hours(engine)
            look(11)
            with pytest.raises(InternalError, match="completed no step"):
                asked.finished()
        assert "in never" in caplog.text, "the log tells where the thread stands"
        assert _status(engine) == "stalled"
        with pytest.raises(EngineStoppedError, match="completed no step"):
            Asked(engine, prompt(1, 20), max_new_tokens=5)
        go.set()
        assert wait_for(lambda: engine.stats().running == 0)
        look(0)
        assert _status(engine) == "ready"
        assert ask(engine, prompt(1, 20), max_new_tokens=5, **ENDLESS) == expected


def test_draining_ends_although_the_thread_never_comes_back(make_model: MakeModel) -> None:
    with running_engine(make_model("4k"), stall_timeout=0.0) as engine:
        go = _stuck(engine)
        asked = Asked(engine, prompt(1, 20), max_new_tokens=5)
        asyncio.run(engine.drain(2.0))  # the thread waits for ever
        with pytest.raises(InternalError, match="is stopping"):
            asked.finished()
        assert not engine.close(0.0)
        go.set()
        engine._thread.join(600)
        assert engine.close(), "what was left is freed once the thread has ended"
