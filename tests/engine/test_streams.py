"""Sequences with a part of the KV cache each: `kv_unified` off, and Phi-3-128k's first context."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.batch_shapes import BatchShapes
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.errors import RequestTooLargeError
from edge_phi3.engine.runtime import Context
from edge_phi3.generation import API_DEFAULTS
from tests.engine.conftest import Asked, MakeModel, ask, engine_at_rest, generated, running_engine
from tests.engine.test_engine import ENDLESS, prompt
from tests.engine.test_engine import _wait_until as wait_until
from tests.golden.generation_data import differences, read_answers, write_engine_model


@pytest.fixture(scope="module")
def engine(make_model: MakeModel) -> Iterator[Engine]:
    with running_engine(make_model("4k"), ctx_size=4096, parallel=8, kv_unified=False) as running:
        yield running


def test_transformers_answers_all_at_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("golden")
    model = convert(write_engine_model(folder), folder / "model.gguf", outtype="f32").path
    recorded = read_answers("engine")
    scored = {"output_scores": True, "return_dict_in_generate": True}
    with running_engine(model, ctx_size=8192, parallel=16, kv_unified=False, max_queue=len(recorded)) as engine:
        pad = engine.model.defaults.pad_token_id
        asked = [
            Asked(engine, np.array(request.prompt, np.int32), **(dict(API_DEFAULTS) | request.kwargs | scored))
            for request, _ in recorded
        ]
        wrong = {}
        for index, (one, (request, answer)) in enumerate(zip(asked, recorded, strict=True)):
            if found := differences(one.finished().result, request, answer, request.kwargs.get("pad_token_id", pad)):
                wrong[index] = found
    assert not wrong


def test_rows_lie_in_the_order_of_their_sequences(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp computes them one after the other where they do not."""
    context = engine.model.schedulers[0].context
    decode = Context.decode
    decoded: list[list[int]] = []

    def noted(count: int, rows: int) -> NDArray[np.float32]:
        if count == rows > 1:
            decoded.append(context.seq_ids[:count].tolist())
        return decode(context, count, rows)

    options = [{"num_beams": 3}, {"num_beams": 2}, {}, {"repetition_penalty": 1.3}]
    alone = [ask(engine, prompt(seed, 40), max_new_tokens=24, **each, **ENDLESS) for seed, each in enumerate(options)]
    monkeypatch.setattr(engine.model.schedulers[0].writer, "shapes", None)
    monkeypatch.setattr(context, "decode", noted)
    asked = [Asked(engine, prompt(seed, 40), max_new_tokens=24, **each, **ENDLESS) for seed, each in enumerate(options)]
    assert [generated(one.finished()) for one in asked] == alone
    assert any(len(rows) == 7 for rows in decoded)
    assert all(rows == sorted(rows) for rows in decoded)


def test_halves_of_a_batch_are_neighbours(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = engine.model.schedulers[0]
    context, decode = scheduler.context, Context.decode
    decoded: list[list[int]] = []

    def noted(count: int, rows: int) -> NDArray[np.float32]:
        if count == rows == 3:
            decoded.append(context.seq_ids[:count].tolist())
        return decode(context, count, rows)

    options = {"max_new_tokens": 60, **ENDLESS}
    expected = [ask(engine, prompt(seed, 30), **options) for seed in range(6)]
    monkeypatch.setattr(scheduler.writer, "shapes", BatchShapes({size: float(size**2) for size in range(1, 33)}))
    monkeypatch.setattr(context, "decode", noted)
    early = Asked(engine, prompt(0, 30), max_new_tokens=6, **ENDLESS)
    asked = [Asked(engine, prompt(seed, 30), **options) for seed in range(1, 6)]
    early.finished()
    # The newest takes the lowest id, which the first has left.
    asked.insert(0, Asked(engine, prompt(0, 30), **options))
    assert [generated(one.finished()) for one in asked] == expected
    assert decoded
    assert all(rows == list(range(rows[0], rows[0] + 3)) for rows in decoded)


def _batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Note the sequence ids of each batch from now on."""
    context, decode = engine.model.schedulers[0].context, Context.decode
    noted: list[list[int]] = []

    def note(count: int, rows: int) -> NDArray[np.float32]:
        noted.append(context.seq_ids[:count].tolist())
        return decode(context, count, rows)

    monkeypatch.setattr(context, "decode", note)
    return noted


def test_gaps_are_filled_and_prompts_are_computed_apart(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = engine.model.schedulers[0]
    modes = [{}, {"min_new_tokens": 9}, {"repetition_penalty": 1.3}, {}, {"no_repeat_ngram_size": 3}]
    options = [{"max_new_tokens": 20 + 9 * seed, **mode, **ENDLESS} for seed, mode in enumerate(modes)]
    monkeypatch.setattr(scheduler.writer, "shapes", None)
    expected = [ask(engine, prompt(seed, 30), **each) for seed, each in enumerate(options)]
    # Every batch costs the same, so that one with gaps costs more than one without.
    monkeypatch.setattr(scheduler.writer, "shapes", BatchShapes(dict.fromkeys(range(1, 33), 1.0)))
    batches = _batches(engine, monkeypatch)
    asked = [Asked(engine, prompt(seed, 30), **each) for seed, each in enumerate(options)]
    assert [generated(one.finished()) for one in asked] == expected
    apart = [sorted(set(ids)) for ids in batches if len(ids) == len(set(ids))]
    assert any(len(ids) == 4 for ids in apart)
    assert all(ids == list(range(ids[0], ids[0] + len(ids))) for ids in apart)
    assert not [ids for ids in batches if len(set(ids)) < len(ids) and min(map(ids.count, set(ids))) == 1]
    wait_until(lambda: engine.stats().cells_used == 0)
    assert all(scheduler.context.position_range(seq_id) == (-1, -1) for seq_id in range(8))


def test_requests_that_arrive_together_stay_together(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their prompts take two batches: the first ones wait for the second batch, so that all decode as one."""
    options = {"ctx_size": 4096, "parallel": 8, "kv_unified": False, "batch_size": 128, "prefix_cache": False}
    with running_engine(make_model("4k"), **options) as engine:
        monkeypatch.setattr(engine.model.schedulers[0].writer, "shapes", None)
        expected = [ask(engine, prompt(seed, 40), max_new_tokens=12, **ENDLESS) for seed in range(6)]
        batches = _batches(engine, monkeypatch)
        with engine_at_rest(engine):
            asked = [Asked(engine, prompt(seed, 40), max_new_tokens=12, **ENDLESS) for seed in range(6)]
        assert [generated(one.finished()) for one in asked] == expected
    assert [sorted(set(ids)) for ids in batches] == [[0, 1, 2], [3, 4, 5], *[[*range(6)]] * 11]


def test_who_decodes_waits_for_one_batch_of_prompts(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine(make_model("4k"), ctx_size=8192, parallel=8, kv_unified=False, batch_size=64) as engine:
        monkeypatch.setattr(engine.model.schedulers[0].writer, "shapes", None)
        batches = _batches(engine, monkeypatch)
        with engine_at_rest(engine):
            first = Asked(engine, prompt(1, 40), max_new_tokens=30, **ENDLESS)
            long = Asked(engine, prompt(2, 600), max_new_tokens=2, **ENDLESS)
        first.finished()
        long.finished()
    chunks = [place for place, ids in enumerate(batches) if len(ids) == 64 and set(ids) == {1}]
    assert len(chunks) == 9
    # Once it has waited for a chunk, it decodes before each.
    assert all(batches[place - 1] == [0] for place in chunks[1:])


def test_a_few_tokens_are_not_taken_from_another(engine: Engine) -> None:
    """To copy them costs more than to compute them; from eight on they are taken."""
    for same, cached in ((7, 0), (8, 8)):
        tokens = prompt(300 + same, 40)
        ask(engine, tokens, max_new_tokens=4, **ENDLESS)
        wait_until(lambda: engine.stats().cells_used == 0)
        other = np.concatenate([tokens[:same], prompt(400 + same, 30)])
        running = Asked(engine, other, max_new_tokens=400, stream=True, **ENDLESS)
        running.events.get(timeout=30)
        third = Asked(engine, np.concatenate([other[:same], prompt(500 + same, 30)]), max_new_tokens=4, **ENDLESS)
        assert third.finished().cached_tokens == cached
        assert running.finished().cached_tokens == cached


def test_a_lone_prompt_is_filled_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = engine.model.schedulers[0]
    lengths = [31, 32, 45, 501, 511]
    monkeypatch.setattr(scheduler.writer, "shapes", None)
    expected = [ask(engine, prompt(600 + length, length), max_length=512, **ENDLESS) for length in lengths]
    # Whole tiles of 16 rows are fast, and each row beyond takes as long as a tile.
    monkeypatch.setattr(
        scheduler.writer, "shapes", BatchShapes({size: float(sum(divmod(size, 16))) for size in range(1, 33)})
    )
    monkeypatch.setattr(scheduler, "_share", False)
    batches = _batches(engine, monkeypatch)
    assert [ask(engine, prompt(600 + length, length), max_length=512, **ENDLESS) for length in lengths] == expected
    sizes = [len(ids) for ids in batches if set(ids) == {ids[0]} and len(ids) > 1]
    assert set(sizes) == {32, 48, 512}


def test_what_is_longer_than_a_part_is_refused(engine: Engine) -> None:
    assert len(ask(engine, prompt(1, 500), max_length=512, **ENDLESS)[0]) == 12
    with pytest.raises(RequestTooLargeError, match="512 KV cells for each sequence"):
        Asked(engine, prompt(1, 500), max_length=513)
    scheduler = engine.model.schedulers[0]
    assert scheduler.room(500, rows=3) == 12


def test_a_conversation_goes_on_from_the_store(engine: Engine) -> None:
    tokens, known = prompt(77, 100), 0
    for turn in range(3):
        event = Asked(engine, tokens, max_new_tokens=30, **ENDLESS).finished()
        assert event.cached_tokens == known
        wait_until(lambda: engine.stats().cells_used == 0)
        known = len(tokens) + 29
        tokens = np.concatenate([event.result.sequences[0], prompt(turn + 90, 20)])
