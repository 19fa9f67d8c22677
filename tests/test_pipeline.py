"""The text side against transformers' text-generation pipeline, and what it refuses."""

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


def prepare(pipeline: TextGenerationPipeline, case: dict[str, Any], **more: Any) -> Any:
    options = {"prompt": None, "messages": None} | {k: v for k, v in case.items() if k != "kwargs"}
    return pipeline.prepare(**options, generate_kwargs={"do_sample": False} | case["kwargs"] | more)


@pytest.mark.parametrize("index", range(len(cases())))
def test_texts_are_those_of_transformers(pipeline: TextGenerationPipeline, index: int) -> None:
    output = asyncio.run(pipeline.generate(prepare(pipeline, cases()[index])))
    assert output.texts == recorded()[index]
    assert output.text == "".join(recorded()[index])


@pytest.mark.parametrize("index", range(0, len(cases()), 3))
def test_streamed_pieces_are_the_answer(pipeline: TextGenerationPipeline, index: int) -> None:
    case = cases()[index]
    prepared = prepare(pipeline, case)

    async def collect() -> tuple[str, GenerationOutput]:
        pieces = [piece async for step in pipeline.stream(prepared) for piece in step]
        output = pieces.pop()
        assert isinstance(output, GenerationOutput)
        assert all(isinstance(piece, TextDelta) for piece in pieces)
        return "".join(piece.text for piece in pieces), output

    text, output = asyncio.run(collect())
    assert output.texts == recorded()[index]
    if "num_beams" in case["kwargs"]:
        assert text == ""
    else:
        assert prepared.lead + text == output.text


def test_usage_counts_tokens(pipeline: TextGenerationPipeline) -> None:
    prepared = prepare(pipeline, {"prompt": QUESTION, "kwargs": {"max_new_tokens": 9, "eos_token_id": []}})
    output = asyncio.run(pipeline.generate(prepared))
    assert output.prompt_tokens == len(pipeline.tokenize(QUESTION))
    assert output.completion_tokens == 9
    assert output.finish_reasons == ["length"]
    assert output.sequences[0][: output.prompt_tokens] == pipeline.tokenize(QUESTION)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ({"prompt": None}, "^Text generation parameter prompt required$"),
        ({"prompt": ""}, "^Text generation parameter prompt required$"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt or messages, not both"),
        ({"messages": [{"role": "robot", "content": "b"}]}, "role must be one of system, user, assistant"),
        ({"prompt": "a", "handle_long_generation": "cut"}, "null or 'hole', not 'cut'"),
        (
            {"prompt": "a", "handle_long_generation": "hole", "kwargs": {"max_new_tokens": 400}},
            "400 new tokens are wanted in a context of 192",
        ),
    ],
)
def test_wrong_prompts_are_refused_with_a_sentence(
    pipeline: TextGenerationPipeline, case: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PromptError, match=sentence):
        prepare(pipeline, {"kwargs": {}} | case)


def test_a_prompt_that_leaves_no_room_names_both_numbers(pipeline: TextGenerationPipeline) -> None:
    tokens = len(pipeline.tokenize(QUESTION * 5))
    with pytest.raises(ParameterError, match=rf"`max_length` is 30, .* {tokens} tokens"):
        prepare(pipeline, {"prompt": QUESTION * 5, "kwargs": {"max_length": 30}})


def test_a_chat_template_runs_in_a_sandbox(pipeline: TextGenerationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = ChatTemplate(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr(pipeline, "_template", hostile)
    with pytest.raises(PromptError, match="chat template"):
        prepare(pipeline, {"messages": [{"role": "user", "content": "hi"}], "kwargs": {}})
