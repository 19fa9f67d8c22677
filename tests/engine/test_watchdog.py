"""A step that does not come back is noticed, reported and, in the end, not waited for."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.engine.engine import Engine
from edge_phi3.engine.errors import EngineStoppedError
from edge_phi3.engine.watchdog import Watchdog, stacks
from edge_phi3.errors import InternalError
from tests.engine.conftest import Asked, MakeModel, ask, running_engine
from tests.engine.test_engine import ENDLESS, prompt
from tests.support.services import wait_for

LIMIT = 60.0


class Watched:
    """A watchdog on a clock of its own, and what it calls."""

    def __init__(self) -> None:
        self.now, self.steps, self.busy = 0.0, 0, True
        self.calls: list[str] = []
        self.watchdog = Watchdog(
            LIMIT,
            steps=lambda: self.steps if self.busy else None,
            stalled=lambda _: self.calls.append("stalled"),
            recovered=lambda: self.calls.append("recovered"),
            lost=lambda: self.calls.append("lost"),
            clock=lambda: self.now,
        )

    def pass_time(self, seconds: float, each: Callable[[], None] = lambda: None) -> None:
        """Let the watchdog look once a second."""
        for _ in range(round(seconds)):
            self.now += 1
            each()
            self.watchdog.look()


def test_a_stall_is_reported_once_and_lost_after_the_same_time_again() -> None:
    watched = Watched()
    watched.pass_time(59)
    assert watched.calls == []
    watched.pass_time(2)
    assert watched.calls == ["stalled"]
    watched.pass_time(57)
    assert watched.calls == ["stalled"]
    watched.pass_time(300)
    assert watched.calls == ["stalled", "lost"]


def test_a_step_that_comes_after_all_ends_the_stall() -> None:
    watched = Watched()
    watched.pass_time(70)
    watched.steps += 1
    watched.pass_time(1)
    assert watched.calls == ["stalled", "recovered"]
    watched.pass_time(59)
    assert watched.calls == ["stalled", "recovered"]
    watched.pass_time(10)
    assert watched.calls == ["stalled", "recovered", "stalled"]


def test_who_has_nothing_to_do_is_not_stalled() -> None:
    watched = Watched()
    watched.busy = False
    watched.pass_time(500)
    watched.busy = True
    watched.pass_time(59)
    assert watched.calls == []


def test_slow_steps_are_none() -> None:
    watched = Watched()
    for _ in range(3):
        watched.pass_time(20)
        watched.steps += 1
        watched.pass_time(1)
    watched.pass_time(180)
    assert watched.calls == []
    watched.pass_time(40)
    assert watched.calls == ["stalled"]


def test_time_in_which_the_watchdog_stood_still_does_not_count() -> None:
    watched = Watched()
    watched.pass_time(30)
    watched.now += 100_000
    watched.watchdog.look()
    watched.pass_time(25)
    assert watched.calls == []


def test_the_stacks_tell_where_each_thread_is() -> None:
    told = stacks()
    assert "test_the_stacks_tell_where_each_thread_is" in told
    assert "Thread MainThread" in told


def _stuck(engine: Engine) -> threading.Event:
    """Let the engine's thread stand still in its next decode call, until the event is set."""
    context, go = engine.model.runners[0].context, threading.Event()
    decode = context.decode

    def never(count: int, rows: int) -> Any:
        go.wait()
        return decode(count, rows)

    context.decode = never  # type: ignore[method-assign]
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


LOST = """
import sys, threading
from pathlib import Path
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from tests.engine.conftest import Asked

engine = Engine(EngineSettings(Path(sys.argv[1]), stall_timeout=0.5, exit_on_stall=True))
engine.load()
engine.model.runners[0].context.decode = lambda count, rows: threading.Event().wait()
print("asked", flush=True)
Asked(engine, [300, 301], max_new_tokens=5)
threading.Event().wait()
"""


def test_the_process_exits_with_1_when_the_stall_goes_on(make_model: MakeModel) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", LOST, str(make_model("4k"))]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert ended.stdout == "asked\n"
    assert ended.returncode == 1, ended.stderr
