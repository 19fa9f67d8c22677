"""transformers' recorded answers through the whole engine, on the converted F32 checkpoint, all at once."""

from __future__ import annotations

import pytest

from edge_phi3.conversion.convert import convert
from tests.golden.generation_data import read_answers, write_engine_model
from tests.golden.requests import MODES
from tests.support.engines import compared, running_engine

RECORDED = read_answers("engine")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """In what each answer differs."""
    folder = tmp_path_factory.mktemp("golden")
    model = convert(write_engine_model(folder), folder / "model.gguf", outtype="f32").path
    with running_engine(model, ctx_size=4096, parallel=16, max_queue=len(RECORDED)) as engine:
        return [each.differences for each in compared(engine, RECORDED)]


@pytest.mark.parametrize("mode", MODES)
def test_requests_through_the_engine(found: list[list[str]], mode: str) -> None:
    numbers = [number for number, (request, _) in enumerate(RECORDED) if request.mode == mode]
    assert len(numbers) >= 80
    assert {number: found[number] for number in numbers if found[number]} == {}
