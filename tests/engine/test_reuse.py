"""What a request begins with: cells of those that run, what is kept of those that have finished, or nothing."""

from typing import Any

import numpy as np
import pytest

from edge_phi3.conversion.quantize import quantize
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.llama.context import Context
from tests import paced
from tests.engine.test_engine import ENDLESS, prompt
from tests.support.engines import Asked, MakeModel, ask, engine_at_rest, generated, running_engine
from tests.support.services import wait_for


@pytest.fixture(autouse=True)
def _without_retention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let finished sequences leave the cells of a device too, as when there is no room."""
    monkeypatch.setattr(KVCache, "untidy", property(lambda kv: bool(kv._kept)))


def settled(engine: Engine) -> None:
    """Wait until what finished is kept."""
    assert wait_for(lambda: all(runner.kv.free == runner.kv.cells for runner in engine.model.runners))


@pytest.mark.parametrize("options", [{}, {"kv_cache_type": "f16"}, {"kv_cache_type": "f16", "flash_attn": "off"}])
def test_a_conversation_goes_on_from_the_store(make_model: MakeModel, options: dict[str, Any]) -> None:
    with running_engine(make_model("4k"), ctx_size=2048, **options) as engine:
        tokens, known = prompt(1, 700), 0
        for turn in range(4):
            event = Asked(engine, tokens, max_new_tokens=30, **ENDLESS).finished()
            assert event.cached_tokens == known
            settled(engine)
            known = len(tokens) + 29
            assert engine.stats().stored_tokens == known, "what is shared is kept once"
            tokens = np.concatenate([event.result.sequences[0], prompt(turn + 2, 90)])
        cached = ask(engine, tokens, max_new_tokens=30, **ENDLESS)
    if not options:
        with running_engine(make_model("4k"), ctx_size=2048, prefix_cache=False) as engine:
            assert ask(engine, tokens, max_new_tokens=30, **ENDLESS) == cached
            settled(engine)
            assert engine.stats().stored_tokens == 0


def test_running_prompts_share_cells_and_the_store_adds_the_rest(make_model: MakeModel) -> None:
    common, rest = prompt(1, 600), [prompt(seed, 400) for seed in (2, 3)]
    with running_engine(make_model("4k"), ctx_size=4096) as engine:
        kept = ask(engine, np.concatenate([common, rest[0]]), max_new_tokens=8, **ENDLESS)
        settled(engine)
        with paced.slowly():
            other = Asked(engine, np.concatenate([common, rest[1]]), stream=True, max_new_tokens=900, **ENDLESS)
            other.events.get(timeout=300)
            again = Asked(engine, np.concatenate([common, rest[0]]), stream=True, max_new_tokens=8, **ENDLESS)
            again.events.get(timeout=300)
            with engine_at_rest(engine):
                (runner,) = engine.model.runners
                lengths = sum(runner.kv.length)
                # The whole blocks of the common beginning, two of 256, belong to both.
                assert runner.kv.used == lengths - 512
            event = again.finished()
        assert event.cached_tokens == 999
        assert generated(event) == kept
        engine.cancel(other.running)


def test_where_nothing_can_be_saved_nothing_is_kept(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU without flash attention.
    monkeypatch.setattr(Context, "saves", property(lambda _: False, lambda *_: None), raising=False)
    with running_engine(make_model("4k")) as engine:
        first = ask(engine, prompt(1, 600), max_new_tokens=8)
        settled(engine)
        assert engine.stats().stored_tokens == 0
        assert ask(engine, prompt(1, 600), max_new_tokens=8) == first


def test_a_window_model_goes_on_from_the_store(make_model: MakeModel) -> None:
    with running_engine(make_model("4k"), ctx_size=4096) as engine:
        first = Asked(engine, prompt(1, 2300), max_new_tokens=20, **ENDLESS).finished()
        longer = np.concatenate([first.result.sequences[0], prompt(2, 30)])
        settled(engine)
        second = Asked(engine, longer, max_new_tokens=20, **ENDLESS).finished()
        assert second.cached_tokens == 2319
    with running_engine(make_model("4k"), ctx_size=4096, prefix_cache=False) as engine:
        assert ask(engine, longer, max_new_tokens=20, **ENDLESS) == generated(second)


def test_a_state_that_cannot_be_restored_is_computed(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine(make_model("4k")) as engine:
        expected = ask(engine, prompt(1, 600), max_new_tokens=8)
        settled(engine)
        context = engine.model.runners[0].context
        restore, calls = type(context).restore, iter([True, False])

        def fail_at_the_second(seq_id: int, state: Any, *, behind: bool) -> bool:
            return restore(context, seq_id, state, behind=behind) and next(calls)

        monkeypatch.setattr(context, "restore", fail_at_the_second)
        event = Asked(engine, prompt(1, 600), max_new_tokens=8).finished()
        assert event.cached_tokens == 0
        assert generated(event) == expected


def test_a_seed_repeats_exactly_on_a_quantised_model_wherever_cells_lie(make_model: MakeModel, tmp_path: Any) -> None:
    quantised = quantize(make_model("wide"), tmp_path / "wide-q4.gguf", type="Q4_K_M").path
    options = {"do_sample": True, "seed": 5, "top_k": 0, "temperature": 1.5, "max_new_tokens": 24, **ENDLESS}
    beams = {"num_beams": 3, "max_new_tokens": 12, **ENDLESS, "do_sample": True, "seed": 8}
    with running_engine(quantised, kv_cache_type="f16", exact_seeds=True) as engine:
        expected, searched = ask(engine, prompt(1, 45), **options), ask(engine, prompt(2, 300), **beams)
        with engine_at_rest(engine):
            others = [Asked(engine, prompt(seed, 50), max_new_tokens=200, **ENDLESS) for seed in range(2, 9)]
            together = [Asked(engine, prompt(1, 45), **options) for _ in range(3)]
            also = Asked(engine, prompt(2, 300), **beams)
        assert [generated(one.finished()) for one in together] == [expected] * 3
        assert generated(also.finished()) == searched
        for other in others:
            engine.cancel(other.running)
    with running_engine(quantised, kv_cache_type="f16", exact_seeds=True) as engine:
        assert ask(engine, prompt(1, 45), **options) == expected
