"""Streaks: steps without books are as exact, and end as soon, as steps with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.engine.engine import Engine
from edge_phi3.engine.errors import DeadlineExceededError
from edge_phi3.engine.sequence import GenerationRequest, TokensEvent
from edge_phi3.engine.streak import Streak
from edge_phi3.generation.config import GenerationConfig
from tests.engine.conftest import Asked, MakeModel, generated, running_engine
from tests.golden.attention import FIRST_TOKEN, LAST_TOKEN

ENDLESS: dict[str, Any] = {"eos_token_id": []}
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"min_new_tokens": 9},
    {"do_sample": True, "seed": 3, "top_k": 10},
    {"do_sample": True, "seed": 4, "top_k": 0, "top_p": 0.8, "temperature": 1.3},
)


def prompt(seed: int, length: int = 20) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(FIRST_TOKEN, LAST_TOKEN, length, dtype=np.int32)


@pytest.fixture(scope="module")
def engine(make_model: MakeModel) -> Iterator[Engine]:
    with running_engine(make_model("4k"), ctx_size=4096, batch_seeded=True) as running:
        yield running


class Steps:
    """Counts the decode calls of an engine, and does something in the middle of one, in the engine's thread."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.at: dict[int, Any] = {}
        context = engine.model.schedulers[0].context
        decode = context.decode

        def counted(count: int, rows: int) -> NDArray[np.float32]:
            self.batches.append(count)
            self.at.get(len(self.batches), lambda: None)()
            return decode(count, rows)

        monkeypatch.setattr(context, "decode", counted)


def test_the_tokens_are_those_of_single_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[list[list[int]]]:
        asked = [
            Asked(engine, prompt(index), max_new_tokens=10 + 7 * index, **MODES[index % len(MODES)])
            for index in range(12)
        ]
        return [generated(one.finished()) for one in asked]

    streaks: list[Streak] = []
    settle = Streak.settle

    def noted(streak: Streak) -> None:
        streaks.append(streak)
        settle(streak)

    monkeypatch.setattr(Streak, "settle", noted)
    in_streaks = answers()
    assert max(streak.steps for streak in streaks) > 4
    assert any(len(streak.requests) > 1 for streak in streaks)
    monkeypatch.setattr(Streak, "of", lambda *_: None)
    assert answers() == in_streaks


def test_who_arrives_is_in_the_next_batch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(engine, monkeypatch)
    later: list[Asked] = []
    steps.at[20] = lambda: later.append(Asked(engine, prompt(102, 30), max_new_tokens=3))
    running = Asked(engine, prompt(101, 10), max_new_tokens=60, **ENDLESS)
    running.finished()
    later[0].finished()
    # Batches may be filled up to a size that was measured to be fast.
    assert max(steps.batches[1:20]) < 30 < steps.batches[20]


def test_who_leaves_gets_no_further_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(engine, monkeypatch)
    asked = Asked(engine, prompt(103, 10), max_new_tokens=500, **ENDLESS)
    steps.at[20] = lambda: engine.cancel(asked.running)
    Asked(engine, prompt(104, 10), max_new_tokens=40, **ENDLESS).finished()
    assert asked.running.cancelled
    assert 0 < asked.running.generated <= 20 < len(steps.batches)


def test_a_time_limit_ends_a_streak(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(engine, monkeypatch)
    config = GenerationConfig.resolve({"do_sample": False, "max_new_tokens": 500, **ENDLESS}, engine.model.defaults)
    events: list[Any] = []
    running = engine.submit(GenerationRequest(prompt(105, 10), config, timeout=1000), events.append)

    def time_passes() -> None:
        running.submitted -= 2000

    steps.at[3] = time_passes
    other = Asked(engine, prompt(106, 10), max_new_tokens=200, **ENDLESS)
    other.finished()
    assert isinstance(events[0], DeadlineExceededError)


def test_a_streak_tells_all_its_tokens_in_order(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._outbox, "_interval", 0.0)
    asked = Asked(engine, prompt(107), stream=True, max_new_tokens=150, **ENDLESS)
    told: list[int] = []
    events = 0
    while isinstance(event := asked.events.get(timeout=30), TokensEvent):
        told += [token for _, token in event.tokens]
        events += 1
    assert not isinstance(event, BaseException)
    assert [told] == generated(event)
    assert events > 100


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["restored", "recomputed"])
def test_a_streak_ends_where_the_cells_do(make_model: MakeModel, prefix_cache: bool) -> None:
    with running_engine(make_model("4k"), ctx_size=256, parallel=4, prefix_cache=prefix_cache) as small:
        asked = [Asked(small, prompt(seed, 30), max_new_tokens=100, **ENDLESS) for seed in range(3)]
        answers = [generated(one.finished()) for one in asked]
        assert small.stats().preemptions_total > 0
    with running_engine(make_model("4k"), parallel=4) as large:
        asked = [Asked(large, prompt(seed, 30), max_new_tokens=100, **ENDLESS) for seed in range(3)]
        assert [generated(one.finished()) for one in asked] == answers
