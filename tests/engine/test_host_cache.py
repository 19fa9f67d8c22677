"""Finished sequences: the store of them, against a plain list, and those that stay in the cells of a device."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.errors import EngineStoppedError
from edge_phi3.engine.host_cache import HostCache
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest
from edge_phi3.generation import GenerationConfig
from tests.support.cores import make_core
from tests.support.hash_context import TOKEN_BYTES
from tests.support.scenarios import DEFAULTS, Scenario

BLOCK = 4
tokens = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    # Much alike: they part at a few places, within a block too, and go on with the same tokens.
    st.builds(
        lambda other, length: [int(place in other) for place in range(length)],
        st.sets(st.integers(0, 5), max_size=2),
        st.integers(1, 14),
    ),
)


def state_of(values: list[int], start: int, end: int) -> np.ndarray:
    """Return a state that says what lies at which position: one byte for each."""
    return np.array([16 * position + values[position] for position in range(start, end)], np.uint8)


def shared(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def save(store: HostCache, values: list[int], start: int = 0) -> list[tuple[int, int]]:
    """Keep a sequence, and return the positions that were read for it."""
    read = []

    def state(first: int, end: int) -> np.ndarray:
        read.append((first, end))
        return state_of(values, first, end)

    store.save(np.array(values, np.int32), start, state)
    return read


def held(store: HostCache, query: list[int], window: int | None = None) -> tuple[int, list[int], int]:
    """Return the length that `match` finds, what is restored from its blocks, and the first position they hold."""
    length, blocks = store.match(np.array(query, np.int32), window)
    restored: list[int] = []
    start = blocks[0].start if blocks else 0
    for block in blocks:
        del restored[max(0, block.begin - start) :]
        restored += block.state.tolist()
    return length, restored, start


@settings(max_examples=100, deadline=None)
@given(st.lists(tokens, max_size=12), st.lists(tokens, min_size=1, max_size=5))
def test_the_longest_prefix_is_found_with_its_content(kept: list[list[int]], queries: list[list[int]]) -> None:
    store = HostCache(1 << 20, BLOCK)
    for values in kept:
        save(store, values)
    for query in queries:
        best = max((shared(values, query) for values in kept), default=0)
        length, content, start = held(store, query)
        assert (length, start) == (best, 0)
        assert content[:best] == state_of(query, 0, best).tolist()
        assert len(content) < best + BLOCK


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.lists(tokens, max_size=9), tokens)
def test_what_a_window_left_is_kept_when_others_hold_it(window: int, kept: list[list[int]], query: list[int]) -> None:
    store = HostCache(1 << 20, BLOCK)
    for values in kept:
        turns = iter([True, False] * len(values))  # a block at a time
        calls = 0
        tokens, start = np.array(values, np.int32), max(0, len(values) - window)
        while not store.save(tokens, start, partial(state_of, values), turns.__next__):
            calls += 1
            assert calls <= len(values), "it is never whole"
        assert save(store, values, start) == [], "it is kept twice"

    def usable(values: list[int]) -> int:
        length = shared(values, query)
        return length if max(0, len(values) - window) <= max(0, length - window + 1) else 0

    length, content, start = held(store, query, window)
    assert length >= max(map(usable, kept), default=0)
    assert start <= max(0, length - window + 1)
    assert content[: length - start] == state_of(query, start, length).tolist()


def test_what_is_kept_already_is_not_read_again() -> None:
    store = HostCache(1 << 20, BLOCK)
    first = [1, 2, 3, 4, 5, 6]
    assert save(store, first) == [(0, 4), (4, 6)]
    assert save(store, first) == []
    assert save(store, first[:3]) == []
    # The block that ended with the sequence grows; those before it stay.
    assert save(store, [*first, 7, 8, 9]) == [(4, 8), (8, 9)]
    assert store.tokens == 9
    assert save(store, [*first[:4], 9, 9]) == [(4, 6)]
    assert store.tokens == 11


def test_sequences_part_inside_a_block() -> None:
    store, first = HostCache(1 << 20, BLOCK), [1, 2, 3, 4, 5, 6, 7, 8]
    save(store, first)
    other = [*first[:6], 9, 9, 9]
    assert save(store, other) == [(6, 9)], "half of a block is shared: it is kept once"
    assert save(store, [*other[:8], 8, 8]) == [(8, 10)], "a branch has branches"
    assert save(store, [*first[:5], 9, 9]) == [(4, 7)], "of little that is shared, restoring the rest costs more"
    assert held(store, [*other, 1])[1] == state_of(other, 0, 9).tolist()
    assert store.tokens == 8 + 3 + 2 + 3
    assert save(store, [*other, 5]) == [(9, 10)], "a block that others go on from stays when its sequence goes on"
    for values in ([*other[:8], 8, 8], [*other, 5]):
        assert held(store, values) == (10, state_of(values, 0, 10).tolist(), 0)


def test_the_least_recently_used_leaf_leaves_first() -> None:
    store = HostCache(12, BLOCK)
    save(store, [1, 1, 1, 1, 2, 2])
    save(store, [5, 5, 5, 5])
    held(store, [1, 1, 1, 1, 2, 2])
    save(store, [7, 7, 7, 7])
    assert held(store, [5, 5, 5, 5])[0] == 0
    assert held(store, [1, 1, 1, 1, 2, 2])[0] == 6
    held(store, [7, 7, 7, 7])
    save(store, [8, 8, 8, 8])
    assert held(store, [1, 1, 1, 1, 2, 2])[0] == 4, "the end of a sequence leaves before its beginning"
    assert held(store, [7, 7, 7, 7])[0] == held(store, [8, 8, 8, 8])[0] == 4


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
        assert (len(kv._kept), kv.used, kv.cells - kv.free) == (1, 0, known), "what is shared is kept once"
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
