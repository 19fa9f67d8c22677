"""transformers' recorded answers through the whole engine, on the converted F32 checkpoint, all at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.generation import API_DEFAULTS, GenerationResult
from tests.engine.conftest import Asked, running_engine
from tests.golden.generation_data import differences, read_answers, write_engine_model
from tests.golden.requests import MODES

RECORDED = read_answers("engine")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("golden")
    model = convert(write_engine_model(folder), folder / "model.gguf", outtype="f32").path
    with running_engine(model, ctx_size=4096, parallel=16, max_queue=len(RECORDED)) as running:
        yield running


@pytest.fixture(scope="module")
def results(engine: Engine) -> list[GenerationResult]:
    scored = {"output_scores": True, "return_dict_in_generate": True}
    asked = [
        Asked(engine, np.array(request.prompt, dtype=np.int32), **(dict(API_DEFAULTS) | request.kwargs | scored))
        for request, _ in RECORDED
    ]
    return [each.finished().result for each in asked]


@functools.cache
def pad_token_id(engine: Engine) -> int:
    pad = engine.model.defaults.pad_token_id
    assert pad is not None
    return pad


@pytest.mark.parametrize("mode", MODES)
def test_requests_through_the_engine(engine: Engine, results: list[GenerationResult], mode: str) -> None:
    wrong = {}
    for index, ((request, answer), result) in enumerate(zip(RECORDED, results, strict=True)):
        if request.mode == mode:
            pad = request.kwargs.get("pad_token_id", pad_token_id(engine))
            if found := differences(result, request, answer, pad):
                wrong[index] = found
    assert not wrong


def test_there_are_400_requests_in_all_modes() -> None:
    assert len(RECORDED) >= 400
    assert {request.mode for request, _ in RECORDED} == set(MODES)
