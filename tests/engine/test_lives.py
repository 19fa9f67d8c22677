"""Random lives of the engine, on contexts that compute nothing (`tests.support.lives`).

By the ten thousand: ``python -m tests.support.fuzz --scenarios 50000 --jobs 2``.
"""

from __future__ import annotations

import functools
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.scheduler import Scheduler
from tests.support.fuzz import time_limit
from tests.support.hash_context import Failure, HashContext
from tests.support.lives import ADMISSION, EARLY, Life, check_admissions, live
from tests.support.scenario_maker import random_scenario
from tests.support.scenarios import Ask, Scenario
from tests.support.threads import live_in_threads

BATCH, BATCHES = 25, 10


def live_all(seeds: Iterable[int], way: Callable[[Scenario], Counter[str]] = live) -> Counter[str]:
    """Live the scenarios of some numbers, and say which failed and how to see it again."""
    met: Counter[str] = Counter()
    for seed in seeds:
        try:
            with time_limit():
                met.update(way(random_scenario(seed)))
        except Exception as error:
            again = f"python -m tests.support.fuzz --scenarios 1 --seed {seed}"
            raise AssertionError(f"scenario {seed} fails; `{again}` shrinks it") from error
    return met


@functools.cache
def live_batch(batch: int) -> Counter[str]:
    return live_all(range(batch * BATCH, batch * BATCH + BATCH))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_request_ends_as_the_reference_says(batch: int) -> None:
    live_batch(batch)


def test_those_scenarios_meet_all_that_they_are_for() -> None:
    met: Counter[str] = Counter()
    for batch in range(BATCHES):
        met.update(live_batch(batch))
    kinds = met.keys() - {ADMISSION, EARLY}
    assert len(kinds) == 18
    rare = {kind: met[kind] for kind in kinds if met[kind] < (1 if kind == "broken" else 5)}
    assert not rare, f"{BATCH * BATCHES} scenarios hardly met {rare}"
    check_admissions(met)


def test_prompts_that_share_their_cells_run_beside_each_other() -> None:
    kwargs = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": []}
    asks = tuple(Ask((*range(3, 53), last), kwargs, arrives=2 * (last > 60)) for last in (60, 61, 62))
    life = Life(Scenario(asks, cells=(100,)))
    life.run()
    assert life.scheduler.preemptions == 0
    assert life.steps < 2 * 10, "they ran one after the other"


def test_so_do_those_of_scenarios_that_nobody_has_seen() -> None:
    first = secrets.randbits(40)
    live_all(range(first, first + BATCH))


def test_with_a_thread_for_the_engine() -> None:
    live_all(range(10_000, 10_000 + 2 * BATCH), live_in_threads)


def test_a_chunk_of_a_prompt_and_the_window_before_it_must_fit() -> None:
    ask = Ask(tuple(range(3, 23)), {"do_sample": False, "max_new_tokens": 4})
    for cells, refused in ((9, 1), (10, 0)):
        assert live(Scenario((ask,), cells=(cells,), window=5, window_chunk=6))["refusal"] == refused


def _tokens(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


GREEDY, DRAWN = {"do_sample": False}, {"do_sample": True}


def in_groups(beams: int, groups: int, penalty: float) -> dict[str, Any]:
    return GREEDY | {"num_beams": beams, "num_beam_groups": groups, "diversity_penalty": penalty}


FAILED_ONCE = {
    "an event cannot be sent after a row has ended": Scenario(
        (
            Ask(
                _tokens("13 27 68 21 6 36 60 30 1 25 31 40 39 16 33 20"),
                DRAWN | {"num_return_sequences": 3, "max_length": 35},
                fault="send",
                fault_at=1,
                entropy=720236688083281350,
            ),
        ),
        cells=(47,),
        window=9,
        window_chunk=6,
        share_prefixes=False,
    ),
    "what a request that failed while choosing leaves in the host cache": Scenario(
        (
            Ask(
                (2,),
                DRAWN | {"eos_token_id": [29, 50, 5, 54, 14, 42, 27], "num_return_sequences": 2, "max_new_tokens": 3},
                constrained=True,
                fault="masking",
                fault_at=9,
            ),
        ),
        cells=(78,),
        host_cache=672,
    ),
    "a shared beginning in front of a block that begins late": Scenario(
        (
            Ask(_tokens("22 41 60 3 65 57 64 1 67 64 22 38"), GREEDY | {"max_new_tokens": 20}),
            Ask((8,), GREEDY | {"max_new_tokens": 20}, after=0),
            Ask(
                _tokens(
                    "27 49 37 11 18 56 45 60 56 30 52 53 64 49 6 56 29 54 56 26 1 47 52 33 56 13"
                    " 50 42 42 36 35 63 30 64 68 56 50 12"
                ),
                in_groups(2, 2, 0.293) | {"max_new_tokens": 12},
                arrives=2,
            ),
            Ask((62,), GREEDY | {"max_new_tokens": 1}, arrives=4, after=1),
        ),
        cells=(56, 75),
        max_tokens=27,
        window=30,
        host_cache=32000,
    ),
    "one that crosses into a context where another's prompt is its answer": Scenario(
        (
            Ask(
                _tokens("12 59 39 61 38 38 10 15 9 16 15 17 39 27 21 59 28 51 67 52 53 21 19 42 15 19 35 52"),
                GREEDY | {"max_length": 53},
            ),
            Ask((4,), GREEDY | {"max_new_tokens": 1}, arrives=2, after=0),
        ),
        cells=(41, 42),
        max_tokens=30,
        window=5,
        window_chunk=5,
        share_prefixes=False,
    ),
    "a failed batch that holds the last of those who came together, but not the one before": Scenario(
        (
            Ask((36, 41, 11, 59, 42, 16, 38), GREEDY | {"max_new_tokens": 1}),
            Ask((61, 47), DRAWN | {"max_length": 25}),
            Ask((61,), GREEDY | {"max_new_tokens": 1}),
        ),
        cells=(174,),
        batch_size=8,
        share_prefixes=False,
        failures=(Failure(0, 1, 1, False, 0),),
    ),
    "a batch number of the other context makes a request wait": Scenario(
        (
            Ask((53, 68, 17, 19, 34, 3), GREEDY | {"max_length": 15}),
            Ask((64, 56, 7, 69, 1, 67, 13, 56, 16, 21, 39), in_groups(6, 3, 1.176) | {"max_new_tokens": 6}, arrives=5),
        ),
        cells=(217, 227),
        max_tokens=12,
        share_prefixes=False,
        sizes=(8, 5, 2, 2, 3, 1, 3, 3),
    ),
    "another comes, crosses and leaves in the step in which a request with a seed leaves": Scenario(
        (
            Ask((64, 60, 19), DRAWN | {"max_new_tokens": 10, "seed": 205230327074452889}, leaves=9),
            Ask(tuple(range(1, 35)), in_groups(2, 2, 0.914) | {"max_length": 42}),
        ),
        cells=(70, 71),
        max_tokens=34,
        share_prefixes=False,
        host_cache=32000,
        exact_seeds=True,
    ),
}


@pytest.mark.parametrize("name", FAILED_ONCE)
def test_what_failed_once(name: str) -> None:
    live(FAILED_ONCE[name])


# -- the checks can fail


class ShortCopy(HashContext):
    """Shares one cell too few."""

    def _cells_to_copy(self, source: int) -> NDArray[np.intp]:
        return super()._cells_to_copy(source)[1:]


class StaleRestore(HashContext):
    """Takes cells for what is restored, and leaves in them what they held."""

    def restore(self, seq_id: int, state: NDArray[np.uint8], *, behind: bool) -> bool:
        before = self._data.copy()
        restored = super().restore(seq_id, state, behind=behind)
        self._data[:] = before
        return restored


class NothingFreed(HashContext):
    """Forgets to take what has left the window."""

    def remove(self, seq_id: int, start: int, end: int) -> None:
        if start != 0:
            super().remove(seq_id, start, end)


class NothingZeroed(HashContext):
    """Leaves what is no number after a failure."""

    def clear(self, *, zero: bool = False) -> None:  # noqa: ARG002 - that is what is wrong
        super().clear(zero=False)


class OneRotarySet(HashContext):
    """Has the same rotary factors in all contexts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"rotary": 0})


class NoWindowCheck(HashContext):
    """Leaves it to the answers whether tokens saw what they should."""

    def _check_window(self, seq_id: int, begin: int, position: int) -> None:
        pass


class Slot(HashContext):
    """Writes a token where another one is."""

    def _free_slots(self, count: int) -> NDArray[np.intp] | None:
        slots = super()._free_slots(count)
        if slots is not None and self.used > 12:
            self._data[(self._owners > 0).nonzero()[0][0]] += np.uint64(1)
        return slots


def caught_within(count: int, **options: Any) -> str:
    """Return the first error of some scenarios."""
    for seed in range(count):
        try:
            live(random_scenario(seed), **options)
        except AssertionError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("context", "count"),
    [(ShortCopy, 20), (StaleRestore, 60), (NothingFreed, 20), (NothingZeroed, 100), (OneRotarySet, 60), (Slot, 20)],
)
def test_a_wrong_context_is_found(context: type[HashContext], count: int) -> None:
    assert caught_within(count, make_context=context)


@pytest.mark.parametrize("wrong", [-1, 1])
@pytest.mark.parametrize("context", [HashContext, NoWindowCheck])
def test_a_wrong_window_is_found(wrong: int, context: type[HashContext]) -> None:
    assert caught_within(40, wrong_window=wrong, make_context=context)


def _at_the_end(scheduler: Scheduler, request: Any) -> None:
    scheduler.waiting.append(request)


def _one_too_few(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda kv, cells: original(kv, cells[1:])


def _one_too_many(original: Callable[..., Any]) -> Callable[..., Any]:
    def shared_prefix(kv: KVCache, tokens: NDArray[np.int32]) -> tuple[int, int | None]:
        length, owner = original(kv, tokens)
        more = owner is not None and length < min(len(tokens), kv.length[owner])
        return length + more, owner

    return shared_prefix


def _for_all(core: EngineCore, request: Any, why: str) -> None:
    for each in [*core.scheduler.running]:
        core.scheduler.retire(each)
        core._end(each, RuntimeError(why))


def _nothing(*_arguments: Any) -> None:
    pass


WRONG: dict[str, tuple[type, str, Callable[[Any], Any], int]] = {
    "who comes back waits behind all others": (Scheduler, "enqueue", lambda _: _at_the_end, 60),
    "one token too many is shared": (KVCache, "shared_prefix", _one_too_many, 60),
    "one request's failure ends others": (EngineCore, "_fail", lambda _: _for_all, 60),
    "a cell is never freed": (KVCache, "_let_go", _one_too_few, 20),
    "finished sequences keep their cells": (KVCache, "settle", lambda _: _nothing, 20),
    "what never fits is not refused": (Scheduler, "refuse_what_never_fits", lambda _: _nothing, 40),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, wrong, count = WRONG[name]
    monkeypatch.setattr(owner, attribute, wrong(getattr(owner, attribute)))
    assert caught_within(count)
