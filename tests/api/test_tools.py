"""Tools, asked for with OpenAI's own client: calls that follow their schemas, whole, in a stream, and in responses."""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from edge_phi3.conversion.convert import convert
from tests.api.conftest import CHAT, USER, Running, loader, openai_client, ready, spelling
from tests.golden.family import write_member
from tests.support.cases import cases, tables
from tests.support.schemas import random_schema
from tests.support.services import PATIENCE, serving

TOOLS, CALLED, FLAT, ITEMS = (tables(__file__)[name] for name in ("TOOLS", "CALLED", "FLAT", "ITEMS"))


def shape(choice: Any) -> tuple[Any, ...]:
    calls = choice.message.tool_calls or ()
    assert all(call.type == "function" and call.id.startswith("call_") for call in calls)
    tokens = [each.token for each in choice.logprobs.content] if choice.logprobs else []
    return choice.message.content or "", [(call.function.name, call.function.arguments) for call in calls], tokens


def joined(stream: Any) -> list[tuple[Any, ...]]:
    """Return text, calls, tokens and finish reason of each choice of a stream, put together by OpenAI's client."""
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in stream:
        deltas = [call.function for choice in chunk.choices for call in choice.delta.tool_calls or ()]
        assert all(delta.name is None or not delta.arguments for delta in deltas)
        state.handle_chunk(chunk)
    choices = state.current_completion_snapshot.choices
    ids = [call.id for choice in choices for call in choice.message.tool_calls or ()]
    assert len({*ids}) == len(ids)
    return [(*shape(choice), choice.finish_reason) for choice in choices]


@cases
def test_calls_follow_the_choice_and_streams_are_the_plain_answer(
    api: Running, ask: Any, more: dict[str, Any], names: list[str], most: int
) -> None:
    arguments: dict[str, Any] = {"tools": TOOLS, "temperature": 1.5, "seed": 3, "n": 3, "max_tokens": 900, **more}
    arguments["logprobs"] = True
    begins = arguments.pop("begins", "")
    arguments["extra_body"] = {"generate_kwargs": spelling(api, begins) if begins else {}}
    whole = [(*shape(choice), choice.finish_reason) for choice in ask(**arguments).choices]
    assert joined(ask(**arguments, stream=True)) == whole
    assert "stop" not in more or "stop" in {reason for *_, reason in whole}, "a call that is cut is none"
    for text, calls, _, reason in whole:
        assert text.strip() == begins.removesuffix("functools[").strip() or most == 0
        assert len(calls) <= most
        assert bool(calls) is bool(names)
        assert {name for name, _ in calls} <= {*names}
        assert reason in {"length", "tool_calls" if names else "stop", "stop" if "stop" in more else "length"}
        schemas = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
        for name, written in calls[: None if reason == "tool_calls" else -1]:
            jsonschema.validate(json.loads(written), schemas[name] or {"type": "object", "maxProperties": 0})


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_calls_of_random_tools_parse_and_validate(api: Running, count: int, tmp_path: Path) -> None:
    """With a bias to tokens that close strings, lists and objects; with the demo model where there is time."""
    with contextlib.ExitStack() as stack:
        url = f"http://127.0.0.1:{api.port}"
        if count > 20:
            url = stack.enter_context(serving(tmp_path, "--threads", "1")).url
        client = stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE))
        biases = [[text, 4] for text in ('"', "}", "]", '"}', "}}", "]}")]
        ended = 0
        for number in range(count):
            schema = random_schema(random.Random(number), 3)
            tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
            body = {"messages": USER, "tools": tools, "tool_choice": "required", "seed": number}
            body |= {"max_tokens": 512, "temperature": 1, "logit_bias": biases, "parallel_tool_calls": False}
            answer = client.post(CHAT, json=body)
            assert answer.status_code == 200, (schema, answer.text)
            (choice,) = answer.json()["choices"]
            if choice["finish_reason"] == "tool_calls":
                ended += 1
                (call,) = choice["message"]["tool_calls"]
                jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
        assert ended >= 0.9 * count


def test_phi_4_mini_has_tokens_for_calls(tmp_path: Path) -> None:
    path = convert(write_member(tmp_path, "phi-4-mini-instruct", layers=1), tmp_path / "model.gguf").path
    with ready(loader(path)) as api, openai_client(api) as client:
        begin, _ = api.service.pipeline.call_tokens or (0, 0)
        asked: dict[str, Any] = {"model": "m", "messages": [*USER, *CALLED], "tools": TOOLS}
        asked |= {"seed": 1, "max_tokens": 700}
        required: dict[str, Any] = {"tool_choice": "required"}
        skipping = required | {"extra_body": {"skip_special_tokens": True}}
        for more in (required, {"logit_bias": {str(begin): 100}}, skipping):
            whole = client.chat.completions.create(**asked, **more).choices
            assert [shape(choice)[0] for choice in whole] == [""]
            assert whole[0].message.tool_calls
            streamed = joined(client.chat.completions.create(**asked, **more, stream=True))
            assert streamed == [(*shape(choice), choice.finish_reason) for choice in whole]


@cases
@pytest.mark.parametrize("temperature", [0, 2])
def test_each_spelling_of_a_format_holds_the_answer(
    ask_for: Any, body: dict[str, Any], pattern: str, temperature: float
) -> None:
    answer = ask_for(**body, max_tokens=60, temperature=temperature, seed=2)
    assert answer["finish_reason"] == "stop"
    jsonschema.validate(answer["text"], {"type": "string", "pattern": f"^({pattern})$"})


# -- responses


@pytest.fixture(scope="module")
def respond(client: openai.OpenAI) -> Any:
    return lambda **arguments: client.responses.create(
        **{"model": "m", "input": "Go.", "temperature": 0, "max_output_tokens": 300} | arguments
    )


def ordered(kinds: list[str]) -> Iterator[str]:
    """Yield the kinds of events, of deltas in a row the first alone."""
    for before, kind in zip([None, *kinds], kinds, strict=False):
        if kind != before:
            yield kind.removeprefix("response.")


@cases
def test_a_response_is_streamed_in_order_and_is_the_plain_one(
    respond: Any, asked: Any, status: str, events: str
) -> None:
    plain, told = respond(**asked), list(respond(**asked, stream=True))
    last = told[-1].response
    assert [each.sequence_number for each in told] == list(range(len(told)))
    middle = ["function_call_arguments.delta", "function_call_arguments.done"]
    if events == "text":
        middle = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    expected = ["created", "in_progress", "output_item.added", *middle, "output_item.done", status]
    assert list(ordered([each.type for each in told])) == expected
    assert (plain.status, last.status) == (status, status)
    assert plain.usage.output_tokens == last.usage.output_tokens > 0
    streamed = "".join(each.delta for each in told if each.type.endswith("text.delta"))
    assert plain.output_text == last.output_text == streamed
    (item,), (other,) = plain.output, last.output
    assert (item.type, item.status) == (other.type, other.status)
    if events == "call":
        assert (item.name, item.arguments) == (other.name, other.arguments)
        assert "".join(each.delta for each in told if each.type.endswith("arguments.delta")) == item.arguments
        json.loads(item.arguments)


def test_a_response_is_the_chat_s_answer(respond: Any, ask: Any, api: Running) -> None:
    turns: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go."}]
    chat = ask(messages=[*turns, *CALLED], tools=TOOLS, max_tokens=20, logprobs=True, top_logprobs=2)
    response = respond(
        input=ITEMS, instructions="Be brief.", tools=FLAT, max_output_tokens=20, top_logprobs=2, metadata={"a": "b"}
    )
    assert response.output_text == chat.choices[0].message.content
    assert (response.usage.input_tokens, response.metadata) == (chat.usage.prompt_tokens, {"a": "b"})
    told, tokens = response.output[0].content[0].logprobs, chat.choices[0].logprobs.content
    assert [each.token for each in told] == [each.token for each in tokens]
    for path in ("/v1/responses/resp_1", "/v1/embeddings", "/v1/images/generations", "/v1/audio/speech"):
        absent = api.client.post(path, json={})
        assert absent.status_code == 404
        assert ", since " in absent.json()["error"]["message"]
