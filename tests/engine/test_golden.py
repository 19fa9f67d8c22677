"""transformers' recorded answers through the whole engine: all modes of decoding, and Phi-3's attention.

That is the 2,047-token window of the 4k model, and the two sets of rotary factors of the 128k one.
"""

import os
from typing import Any

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from tests.golden.attention import CASES, Case, recorded
from tests.golden.generation_data import read_answers, write_engine_model
from tests.golden.requests import MODES
from tests.support.engines import Asked, MakeModel, ask, compared, generated, running_engine

ENDLESS: dict[str, Any] = {"eos_token_id": []}
EVERY = int(os.environ.get("TEST_GOLDEN_EVERY", "1"))  # one of so many answers, where time is short
RECORDED = read_answers("engine")[::EVERY]


WINDOWS = {case.name: case for case in CASES if case.model in {"4k", "phi-3-medium-4k"}}
SOAK = [pytest.param(name, marks=pytest.mark.soak) for name in ("4k-3000+24", "4k-3500+24")]


def check(case: Case, engine: Engine) -> None:
    assert ask(engine, case.prompt(), max_new_tokens=case.new_tokens, **ENDLESS) == [recorded()[case.name]]


@pytest.mark.parametrize("name", ["4k-40+24", "4k-2030+48", "4k-2500+24", "phi-3-medium-4k-2500+24", *SOAK])
def test_window_is_exact_one_token_at_a_time(make_model: MakeModel, name: str) -> None:
    with running_engine(make_model(WINDOWS[name].model), ctx_size=4096, window_chunk=1) as engine:
        check(WINDOWS[name], engine)


def test_what_crosses_the_window_is_exact_at_any_chunk_and_no_cache_for_what_needs_its_beginning(
    make_model: MakeModel,
) -> None:
    long, options = WINDOWS["4k-3000+24"].prompt(), {"ctx_size": 8192, "window_chunk": 64}
    with running_engine(make_model("4k"), **options) as engine:
        check(WINDOWS["4k-2030+48"], engine)
        ask(engine, long, max_new_tokens=24, **ENDLESS)
        alone = ask(engine, long[:2040], max_new_tokens=4, **ENDLESS)
    with running_engine(make_model("4k"), **options) as fresh:
        assert ask(fresh, long[:2040], max_new_tokens=4, **ENDLESS) == alone


@pytest.mark.parametrize("model", ["128k", "phi-3.5-mini", "phi-3-medium-128k", "phi-4-mini", "phi-4"])
def test_short_and_long_prompts_side_by_side(make_model: MakeModel, model: str) -> None:
    together = [case for case in CASES if case.model == model]
    with running_engine(make_model(model), ctx_size=16384, parallel=4) as engine:
        asked = [Asked(engine, case.prompt(), max_new_tokens=case.new_tokens, **ENDLESS) for case in together]
        answers = {case.name: generated(one.finished())[0] for case, one in zip(together, asked, strict=True)}
    assert answers == {case.name: recorded()[case.name] for case in together}


@pytest.fixture(scope="module", params=["off", "5"], ids=["no drafts", "drafts of 5"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """In what each answer differs from transformers', all asked at once."""
    folder = tmp_path_factory.mktemp("golden")
    model = convert(write_engine_model(folder), folder / "model.gguf", outtype="f32").path
    options = {"ctx_size": 4096, "parallel": 16, "max_queue": len(RECORDED), "speculation": request.param}
    with running_engine(model, **options) as engine:
        differences = [each.differences for each in compared(engine, RECORDED)]
        assert (engine.stats().totals.accepted > 100 // EVERY) == (request.param == "5")
        return differences


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_of_decoding_at_once(found: list[list[str]], mode: str) -> None:
    numbers = [number for number, (request, _) in enumerate(RECORDED) if request.mode == mode]
    assert len(numbers) >= 80 // EVERY
    assert {number: found[number] for number in numbers if found[number]} == {}
