"""The text side against transformers' text-generation pipeline; what it refuses, `tests/api/test_chat.py` asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.generation.config import ParameterError
from edge_phi3.pipeline import GenerationOutput, PromptError, TextDelta, TextGenerationPipeline
from edge_phi3.pipeline.prompt import ChatTemplate
from tests.engine.conftest import running_engine
from tests.golden.pipeline import cases, recorded, write_model

QUESTION = "<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextGenerationPipeline]:
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder)
    path = convert(folder, folder / "pipeline.gguf", outtype="f32").path
    with running_engine(path, ctx_size=2048) as engine:
        yield TextGenerationPipeline(engine)


def prepare(pipeline: TextGenerationPipeline, case: dict[str, Any]) -> Any:
    options = {"prompt": None, "messages": None} | {k: v for k, v in case.items() if k != "kwargs"}
    return pipeline.prepare(**options, generate_kwargs={"do_sample": False} | case["kwargs"])


@pytest.mark.parametrize("index", range(len(cases())))
def test_texts_are_those_of_transformers(pipeline: TextGenerationPipeline, index: int) -> None:
    output = asyncio.run(pipeline.generate(prepare(pipeline, cases()[index])))
    assert output.texts == recorded()[index]
    assert output.text == "".join(recorded()[index])


@pytest.mark.parametrize("index", range(0, len(cases()), 3))
def test_streamed_pieces_are_the_answer(pipeline: TextGenerationPipeline, index: int) -> None:
    case = cases()[index]
    prepared = prepare(pipeline, case)

    async def collect() -> list[TextDelta | GenerationOutput]:
        return [piece async for step in pipeline.stream(prepared) for piece in step]

    *pieces, output = asyncio.run(collect())
    assert isinstance(output, GenerationOutput)
    assert output.texts == recorded()[index]
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))
    assert text == ("" if "num_beams" in case["kwargs"] else output.text.removeprefix(prepared.lead))


def test_a_prompt_that_leaves_no_room_names_the_numbers(pipeline: TextGenerationPipeline) -> None:
    tokens = len(pipeline.tokenize(QUESTION * 5))
    with pytest.raises(ParameterError, match=rf"`max_length` is 30, .* {tokens} tokens"):
        prepare(pipeline, {"prompt": QUESTION * 5, "kwargs": {"max_length": 30}})
    hole = {"prompt": "a", "handle_long_generation": "hole", "kwargs": {"max_new_tokens": 400}}
    with pytest.raises(PromptError, match="400 new tokens are wanted in a context of 192"):
        prepare(pipeline, hole)


def test_a_chat_template_runs_in_a_sandbox(pipeline: TextGenerationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_template", ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(PromptError, match="chat template"):
        prepare(pipeline, {"messages": [{"role": "user", "content": "hi"}], "kwargs": {}})
