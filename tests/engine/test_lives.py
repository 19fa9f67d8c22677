"""Random lives of the engine, on contexts that compute nothing (`tests.support.lives`).

By the ten thousand: ``python -m tests.support.fuzz --scenarios 50000 --jobs 2``.
"""

import functools
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.engine import sequence
from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.model_runner import ModelRunner
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import FinishedEvent
from edge_phi3.errors import InternalError
from edge_phi3.generation.decoding import TokenLogprobs, token_logprobs
from tests.support.fuzz import live_in_threads, time_limit
from tests.support.hash_context import HashContext
from tests.support.lives import ADMISSION, EARLY, Life, check_admissions, live
from tests.support.scenario_maker import random_scenario
from tests.support.scenarios import VOCABULARY, Ask, InjectedError, Scenario

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
    assert len(kinds) == 21
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


@pytest.mark.parametrize(("prompt", "batches"), [(16, [5, 8, 1, 8, 2]), (4, [5, 1 + 4, 2, 2, 2])])
def test_rows_and_prompts_that_would_fill_a_tile_take_turns(prompt: int, batches: list[int]) -> None:
    kwargs = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": []}
    asks = (Ask((3, 4, 5, 6, 7), kwargs), Ask(tuple(range(20, 20 + prompt)), kwargs, arrives=1))
    life = Life(Scenario(asks, batch_size=8, sizes=(1, 2, 4), share_prefixes=False))
    decoded = [0]
    for _ in batches:
        life._events(life.core.turns)
        life.core.step()
        decoded.append(life.contexts[0].decoded)
    assert np.diff(decoded).tolist() == batches


def test_so_do_those_of_scenarios_that_nobody_has_seen() -> None:
    first = secrets.randbits(40)
    live_all(range(first, first + BATCH))


def test_with_a_thread_for_the_engine() -> None:
    live_all(range(10_000, 10_000 + 2 * BATCH), live_in_threads)


def test_a_chunk_of_a_prompt_and_the_window_before_it_must_fit() -> None:
    ask = Ask(tuple(range(3, 23)), {"do_sample": False, "max_new_tokens": 4})
    for cells, refused in ((9, 1), (10, 0)):
        assert live(Scenario((ask,), cells=(cells,), window=5, window_chunk=6))["refusal"] == refused


def test_a_prompt_that_cannot_be_scored_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored_or_not(rows: NDArray[np.float32], tokens: list[int], top: int) -> list[TokenLogprobs]:
        if top == 1:
            raise InjectedError("It cannot be scored.")
        return token_logprobs(rows, tokens, top)

    kwargs = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": []}
    life = Life(Scenario(tuple(Ask(tuple(range(3, 23)), kwargs, scored=scored) for scored in (1, 2, None)), scored=8))
    monkeypatch.setattr(sequence, "token_logprobs", scored_or_not)
    life.clients[0].fired = True
    life.run()
    assert [type(client.final) for client in life.clients] == [InternalError, FinishedEvent, FinishedEvent]


FAILED_ONCE = msgspec.json.decode(Path(__file__).with_name("failed_once.json").read_bytes(), type=dict[str, Scenario])


@pytest.mark.parametrize("name", FAILED_ONCE)
def test_what_failed_once(name: str) -> None:
    live(FAILED_ONCE[name])


# -- the checks can fail


def _one_too_many(original: Any, kv: KVCache, tokens: NDArray[np.int32], *known: Any) -> tuple[int, int | None]:
    length, owner = original(kv, tokens, *known)
    return length + (owner is not None and length < min(len(tokens), kv.length[owner])), owner


def _for_all(_: Any, core: EngineCore, _request: Any, why: str, *_error: Any) -> None:
    for each in [*core.scheduler.running]:
        core.scheduler.retire(each)
        core._end(each, RuntimeError(why))


def _with_unscored(original: Any, scheduler: Scheduler, request: Any) -> Any:
    return request.stem_tokens() if request.unscored else original(scheduler, request)


def _without_content(original: Any, context: HashContext, *arguments: Any, **options: Any) -> bool:
    before = context._data.copy()
    restored: bool = original(context, *arguments, **options)
    context._data[:] = before
    return restored


def _in_one_rotary_set(original: Any, context: HashContext, *arguments: Any) -> None:
    original(context, *arguments)
    context._rotary = 0


def _over_another(original: Any, context: HashContext, count: int) -> NDArray[np.intp] | None:
    slots: NDArray[np.intp] | None = original(context, count)
    if slots is not None and context.used > 12:
        context._data[(context._owners > 0).nonzero()[0][0]] += np.uint64(1)
    return slots


WRONG: dict[str, tuple[type, str, Callable[..., Any], int]] = {
    "who comes back waits behind all others": (Scheduler, "enqueue", lambda _, s, one: s.waiting.append(one), 60),
    "one token too many is shared": (KVCache, "_longest_shared", _one_too_many, 60),
    "one request's failure ends others": (EngineCore, "_fail", _for_all, 60),
    "a prompt that is scored begins with cells that have no logits": (Scheduler, "_known_tokens", _with_unscored, 100),
    "prompts have the scores beside theirs": (EngineCore, "_score", lambda f, *a: f(*a[:2], np.roll(a[2], 1, 0)), 40),
    "a cell is never freed": (KVCache, "_let_go", lambda original, kv, cells: original(kv, cells[1:]), 20),
    "finished sequences keep their cells": (KVCache, "make_room", lambda *_: None, 20),
    "what never fits is not refused": (Scheduler, "refuse_what_never_fits", lambda *_: None, 40),
    "the context shares one cell too few": (HashContext, "_cells_to_copy", lambda f, *ids: f(*ids)[1:], 20),
    "the context leaves in cells for what is restored what they held": (HashContext, "restore", _without_content, 60),
    "the context keeps what has left the window": (HashContext, "remove", lambda f, *ids: ids[2] and f(*ids), 20),
    "the context leaves what is no number after a failure": (HashContext, "clear", lambda f, self, **_: f(self), 100),
    "the contexts have the same rotary factors": (HashContext, "__init__", _in_one_rotary_set, 60),
    "the context writes a token where another one is": (HashContext, "_free_slots", _over_another, 20),
}
"""A method, what stands in its place and is given the method first, and the scenarios of which one fails then."""


def replace(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, wrong: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **options: wrong(original, *arguments, **options))


def is_caught_within(count: int) -> bool:
    """Return whether one of some scenarios fails."""
    for seed in range(count):
        try:
            live(random_scenario(seed))
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, wrong, count = WRONG[name]
    replace(monkeypatch, owner, method, wrong)
    assert is_caught_within(count)


@pytest.mark.parametrize("wrong", [-1, 1])
@pytest.mark.parametrize("checked", [True, False])
def test_a_wrong_window_is_found(wrong: int, checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is left to the answers whether tokens saw what they should."""

    def in_another(original: Any, runner: ModelRunner, *arguments: Any, window: int | None, **options: Any) -> None:
        original(runner, *arguments, window=None if window is None else window + wrong, **options)

    replace(monkeypatch, ModelRunner, "__init__", in_another)
    if not checked:
        replace(monkeypatch, HashContext, "_check_window", lambda *_: None)
    assert is_caught_within(40)


# -- the context finds misuse


def decode(context: HashContext, seq_id: int, first: int, *tokens: int) -> NDArray[np.float32]:
    count = len(tokens)
    context.tokens[:count], context.positions[:count] = tokens, range(first, first + count)
    context.seq_ids[:count], context.wants_logits[:count] = seq_id, 0
    return context.decode(count, 0)


MISUSE: dict[str, Any] = {
    "a position is left out": lambda context: decode(context, 0, 4, 5),
    "a position comes twice": lambda context: decode(context, 0, 2, 5),
    "a sequence begins late": lambda context: decode(context, 1, 1, 5),
    "there is no such sequence": lambda context: decode(context, 5, 0, 5),
    "there is no such token": lambda context: decode(context, 1, 0, VOCABULARY),
    "other logits are asked for": lambda context: context.decode(1, 1),
    "an empty batch": lambda context: context.decode(0, 0),
    "too large a batch": lambda context: context.decode(9, 0),
    "copied onto what is held": lambda context: (context.copy(0, 1), context.copy(0, 1)),
    "copied onto itself": lambda context: context.copy(0, 0),
    "a hole": lambda context: (context.remove(0, 1, 2), decode(context, 0, 3, 5)),
    "not held": lambda context: context.save(0, 0, 4),
    "behind a gap": lambda context: context.restore(1, context.save(0, 1, 3), behind=True),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_found(name: str) -> None:
    context = HashContext(Scenario((), cells=(16,), parallel=4, batch_size=8))
    decode(context, 0, 0, 5, 6, 7)
    with pytest.raises(AssertionError):
        MISUSE[name](context)
    assert context.violations
