"""Finished sequences stay in the cells of a device; those that leave their cells are copied a little at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.errors import EngineStoppedError
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest
from edge_phi3.generation import GenerationConfig
from tests.support.cores import make_core
from tests.support.hash_context import TOKEN_BYTES
from tests.support.scenarios import DEFAULTS, Scenario


def _rest(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def _submitted(core: EngineCore, tokens: list[int], new: int, events: list[Event]) -> None:
    config = GenerationConfig.resolve({"do_sample": False, "max_new_tokens": new, "eos_token_id": []}, DEFAULTS)
    core.submit(GenerationRequest(np.array(tokens, np.int32), config), events.append)


def test_a_conversation_goes_on_in_the_cells_of_a_device() -> None:
    scenario = Scenario((), cells=(300,), offloaded=True, host_cache=1 << 20, kept_sequences=4)
    core, (context,) = make_core(scenario, lambda: 0.0)
    tokens, known = list(range(1, 40)), 0
    for turn in range(3):
        events: list[Event] = []
        _submitted(core, tokens, 8, events)
        _rest(core)
        (event,) = events
        assert isinstance(event, FinishedEvent)
        assert event.cached_tokens == known
        known = len(tokens) + 7
        kv = core.scheduler.runners[0].kv
        assert (kv.kept, kv.used, kv.cells - kv.free) == (1, 0, known), "what is shared is kept once"
        tokens = [*event.result.sequences[0].tolist(), *range(20 + turn, 30 + turn)]
    assert not context.restored


@pytest.mark.parametrize("offloaded", [False, True])
def test_what_a_step_copies_is_bounded(offloaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block, per_step = 4, 10
    sizes: dict[str, Any] = {"cells": (1000,), "parallel": 17, "host_cache": 1 << 20, "block_size": block}
    scenario = Scenario((), offloaded=offloaded, per_step=per_step * TOKEN_BYTES, **sizes)
    core, (context,) = make_core(scenario, lambda: 0.0)
    copied: list[int] = []
    save = context.save

    def watched(seq_id: int, start: int, end: int) -> np.ndarray:
        copied[-1] += end - start
        return save(seq_id, start, end)

    monkeypatch.setattr(context, "save", watched)
    for first in range(16):
        _submitted(core, [first, *range(40)], 10, [])
    _submitted(core, [60], 100, [])
    while core.has_work:
        copied.append(0)
        core.step()
    assert max(copied) <= per_step + block - 1
    store = core.scheduler.runners[0].kv.host_cache
    assert store is not None
    assert (store.tokens > 16 * 40) == (not offloaded), "a device keeps what fits"


def test_who_has_finished_is_answered_by_an_engine_that_stops() -> None:
    core, _ = make_core(Scenario((), offloaded=True), lambda: 0.0)
    finished: list[Event] = []
    running: list[Event] = []
    _submitted(core, [1, 2, 3], 3, finished)
    _submitted(core, [4, 5], 50, running)
    while len(core.scheduler.running) != 1:
        core.step()
    assert not finished, "it is answered while the next batch is decoded"
    core.stop("It stops.")
    assert [type(event) for event in finished] == [FinishedEvent]
    assert [type(event) for event in running] == [EngineStoppedError]


def test_a_block_that_the_host_cache_has_no_room_for_keeps_nobody_busy() -> None:
    scenario = Scenario((), cells=(300,), host_cache=4 * TOKEN_BYTES, block_size=16, per_step=TOKEN_BYTES)
    core, _ = make_core(scenario, lambda: 0.0)
    _submitted(core, list(range(30)), 3, [])
    for _ in range(20):
        core.step()
    assert not core.has_work


def test_who_has_finished_does_not_wait() -> None:
    core, _ = make_core(Scenario((), offloaded=True, max_queue=1), lambda: 0.0)
    _submitted(core, [1, 2, 3], 3, [])
    core.step()
    _submitted(core, [4, 5], 50, [])
    core.step()
    while len(core.scheduler.running) != 1:
        core.step()
    assert (core.in_flight, core.waiting) == (2, 0)
    _submitted(core, [6], 3, [])
