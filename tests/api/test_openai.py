"""OpenAI's API, asked with OpenAI's own client: what is answered, whole and in a stream."""

import json
import math
import uuid
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai._streaming import SSEDecoder

from edge_phi3.conversion.convert import convert
from tests import paced
from tests.api.conftest import PROMPT, USER, Clock, Running, greedy, joined, loader, openai_client, ready, spelling
from tests.golden.family import write_member
from tests.support.cases import cases

COMPLETION: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 8}


def test_a_conversation_is_answered_as_by_chat_whole_and_in_a_stream(api: Running, ask: Any) -> None:
    completion = ask(max_completion_tokens=12)
    (choice,) = completion.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content == greedy(api, max_new_tokens=12)
    assert (completion.model, completion.object) == ("random-4k", "chat.completion")
    usage = completion.usage
    assert (usage.completion_tokens, usage.total_tokens) == (12, usage.prompt_tokens + 12)

    chunks = list(ask(max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [found[:2] for found in joined(chunks)] == [(choice.message.content, "length")]
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], usage.total_tokens)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_several_answers_are_drawn_with_a_seed_or_equal_without_a_temperature(ask: Any) -> None:
    def texts(**arguments: Any) -> list[str | None]:
        choices = ask(n=3, max_tokens=10, **arguments).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        return [choice.message.content for choice in choices]

    drawn = {"temperature": 1.5, "top_p": 0.9}
    first = texts(seed=7, **drawn)
    assert len(set(first)) == 3
    assert texts(seed=7, **drawn) == first
    assert texts(seed=-8, **drawn) == texts(seed=-8, **drawn) != first
    assert texts(seed=-1, **drawn) != texts(seed=-1, **drawn), "as llama-server and gateways mean it"
    assert len(set(texts())) == 1


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text_or_with_it(api: Running, ask: Any, stream: bool, shown: bool) -> None:
    whole = greedy(api, max_new_tokens=40)
    stop = whole[12:15]
    end = whole.index(stop) + shown * len(stop)
    stops = [*(f"<{letter}>" for letter in "abcdef"), stop]
    answer = ask(max_tokens=40, stop=stops, stream=stream, extra_body={"include_stop_str_in_output": shown})
    assert [found[:2] for found in joined(answer)] == [(whole[:end], "stop")]


def emoji(api: Running, **more: int) -> dict[str, Any]:
    """Return what makes a model spell 😀, in the four byte tokens that its vocabulary has for it, again and again."""
    return spelling(api, "😀") | {"eos_token_id": -1} | more


@pytest.mark.parametrize("kind", ["phi-3", "phi-4-mini-instruct"])
def test_a_character_of_bytes_goes_out_whole_and_may_be_a_stop(kind: str, model_path: Path, tmp_path: Path) -> None:
    if kind != "phi-3":
        model_path = convert(write_member(tmp_path, kind, layers=1), tmp_path / "model.gguf").path
    with ready(loader(model_path, stream_interval=0)) as api, openai_client(api) as client:
        spelt = {"generate_kwargs": emoji(api, max_new_tokens=62)}
        asked: dict[str, Any] = {"model": "any", "messages": USER, "extra_body": spelt}
        chunks = list(client.chat.completions.create(**asked, stream=True))
        pieces = [piece for chunk in chunks if (piece := chunk.choices[0].delta.content)]
        assert pieces == ["😀"] * 15 + ["\ufffd"]
        assert client.chat.completions.create(**asked).choices[0].message.content == "".join(pieces)
        # For transformers, a run of Phi-3's bytes is UTF-8 as a whole, or each of them is lost.
        answer = {"Result": "\ufffd" * 62 if kind == "phi-3" else "".join(pieces)}
        assert api.chat(messages=USER, **spelt).json() == answer
        told = SSEDecoder().iter_bytes(iter([api.chat(messages=USER, **spelt, stream=True).content]))
        *parts, last = [each.json() for each in told]
        assert ("".join(part["text"] for part in parts), last) == (answer["Result"], answer)
        asked |= {"extra_body": {"generate_kwargs": emoji(api)}, "stop": "😀😀", "max_tokens": 64}
        for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            found: Any = client.chat.completions.create(**asked | more)
            chunks = list(found) if more else [found]
            assert [each[:2] for each in joined(chunks)] == [("", "stop")]
            assert chunks[-1].usage.completion_tokens == 8


def test_a_stop_counts_only_in_what_is_generated_which_is_of_16_tokens_by_default(api: Running, client: Any) -> None:
    asked = {"model": "any", "temperature": 0, "extra_body": {"generate_kwargs": {"eos_token_id": -1}}}
    default = client.completions.create(prompt="json", **asked)
    assert default.usage.completion_tokens == 16
    text = default.choices[0].text
    stop = "n" + text[0]
    assert stop not in text
    answer = client.completions.create(prompt="json", stop=stop, **asked)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
    kwargs = {"do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True, "max_new_tokens": 16}
    usage = api.chat(prompt="json", generate_kwargs={**kwargs, "stop_strings": stop}).json()["usage"]
    assert usage["completion_tokens"] == 1, "as in transformers, whose stop strings may begin in the prompt"


def test_a_prompt_may_come_as_tokens(api: Running, client: Any) -> None:
    texts = [PROMPT, "json"]
    tokens = [api.tokenize(text=text)["tokens"] for text in texts]
    by_text = client.completions.create(prompt=texts, echo=True, **COMPLETION)
    by_tokens = client.completions.create(prompt=tokens, **COMPLETION)
    for text, choice in zip(texts, by_text.choices, strict=True):
        assert choice.text == text + by_tokens.choices[choice.index].text
    alone = client.completions.create(prompt=tokens[0], echo=True, **COMPLETION)
    prompt = api.client.post("/detokenize", json={"tokens": tokens[0]}).json()["text"]
    assert alone.choices[0].text == prompt + by_tokens.choices[0].text
    assert alone.usage.prompt_tokens == len(tokens[0])
    smiley = api.tokenize(text="😀")["tokens"]  # which ends in four bytes
    cut = client.completions.create(prompt=[*smiley, *smiley[-4:-1]], echo=True, **COMPLETION)
    assert cut.choices[0].text.startswith("😀\ufffd")


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_one_list_of_choices(client: Any, stream: bool) -> None:
    prompts = ["json", "os.path", "re"]
    alone = [client.completions.create(prompt=prompt, n=2, **COMPLETION).choices for prompt in prompts]
    expected = [choice.text for choices in alone for choice in choices]
    answer = client.completions.create(prompt=prompts, n=2, stream=stream, **COMPLETION)
    assert [text for text, _, _ in joined(answer)] == expected


def test_the_model_is_listed_and_described_and_answers_by_any_name(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["random-4k"]
    assert client.models.retrieve("random-4k").object == "model"
    assert client.completions.create(model="gpt-4o", prompt=PROMPT, max_tokens=1).model == "random-4k"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


def test_errors_have_openai_s_classes_also_in_a_stream(model_path: Path, clock: Clock) -> None:
    question: dict[str, Any] = {"model": "any", "messages": USER}
    endless = {"generate_kwargs": {"eos_token_id": -1}}
    with ready(loader(model_path), api_key=["right"], max_new_tokens=500, request_timeout=60) as api:
        with openai_client(api, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with openai_client(api, "right") as client, paced.slowly():
            with pytest.raises(openai.BadRequestError, match="--max-new-tokens"):
                client.chat.completions.create(**question, max_tokens=501)
            stream = client.chat.completions.create(**question, stream=True, extra_body=endless)
            next(stream)
            clock.now += 61
            with pytest.raises(openai.APIError, match="time limit"):
                list(stream)


ENDLESS: dict[str, Any] = {"eos_token_id": -1}
PLAIN: dict[str, Any] = {"suppress_tokens": [*range(259), *range(501, 2000)], **ENDLESS}
"""Answers of ordinary pieces (no bytes, no special tokens) up to their greatest length."""


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 1.5), (1.0, 0.5), (-2.0, -1.0)])
def test_penalties_follow_the_formula(ask: Any, presence: float, frequency: float) -> None:
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
    answer = ask(max_tokens=60, logprobs=True, top_logprobs=20, generate_kwargs=ENDLESS, **penalties)
    before: list[bytes] = []

    def penalised(token: Any) -> float:
        count = before.count(bytes(token.bytes))
        return token.logprob - count * frequency - (presence if count else 0)

    changed = 0
    for token in answer.choices[0].logprobs.content:
        assert penalised(token) >= max(map(penalised, token.top_logprobs)) - 1e-4
        changed += token.token != token.top_logprobs[0].token
        before.append(bytes(token.bytes))
    assert changed > 0


def test_logprobs_are_those_of_the_model(api: Running, ask: Any) -> None:
    answer = ask(max_tokens=12, logprobs=True, top_logprobs=3, generate_kwargs=ENDLESS)
    kwargs = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True}
    (scores,) = api.chat(messages=USER, generate_kwargs=kwargs | ENDLESS).json()["scores"]
    tokens = answer.choices[0].logprobs.content
    assert [token.logprob for token in tokens] == pytest.approx([score["logprob"] for score in scores], abs=1e-4)
    for token in tokens:
        logprobs = [other.logprob for other in token.top_logprobs]
        assert (token.top_logprobs[0].token, logprobs[0]) == (token.token, token.logprob)
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)


def test_a_bias_and_a_temperature_do_not_change_them(api: Running, ask: Any) -> None:
    token = api.tokenize(text="the")["tokens"][-1]
    plain, forced = (
        ask(max_tokens=1, logprobs=True, top_logprobs=20, **more).choices[0].logprobs.content[0]
        for more in ({}, {"temperature": 2, "logit_bias": {str(token): 100}})
    )
    assert forced.token != plain.token
    assert forced.logprob < -1
    assert [each.token for each in forced.top_logprobs] == [each.token for each in plain.top_logprobs]


@pytest.mark.parametrize("stop", [None, "used"])
def test_a_stream_tells_the_same_as_one_body(ask: Any, stop: str | None) -> None:
    arguments: dict[str, Any] = {"temperature": 1, "n": 3, "seed": 5, "max_tokens": 40}
    arguments |= {"logprobs": True, "top_logprobs": 2, "generate_kwargs": ENDLESS}
    if stop:
        arguments["stop"] = ask(**arguments).choices[1].message.content[20:23]
    whole, streamed = (joined(ask(stream=stream, **arguments)) for stream in (False, True))
    assert [text for text, _, _ in streamed] == [text for text, _, _ in whole]
    for (_, _, tokens), (_, _, others) in zip(streamed, whole, strict=True):
        assert [token.bytes for token in tokens] == [other.bytes for other in others]
        # The same to the last bits, which depend on where llama.cpp keeps a sequence.
        logprobs = [other.logprob for other in others]
        assert [token.logprob for token in tokens] == pytest.approx(logprobs, abs=1e-4)
        assert {len(token.top_logprobs) for token in (*tokens, *others)} == {2}
    lengths = [len(tokens) for _, _, tokens in streamed]
    assert lengths[1] < 40 if stop else min(lengths) > 30


def test_tokens_that_a_stop_text_cuts_off_are_not_told(ask: Any) -> None:
    arguments: dict[str, Any] = {"max_tokens": 40, "logprobs": True, "generate_kwargs": PLAIN}
    ((_, _, tokens),) = joined(ask(**arguments))
    texts = [token.token for token in tokens]
    at = next(place for place in range(5, 40) if len(texts[place]) > 1 and texts[place] not in "".join(texts[:place]))
    ((text, reason, tokens),) = joined(ask(**arguments, stop=texts[at]))
    assert (text, reason) == ("".join(texts[:at]), "stop")
    assert [token.token for token in tokens] == texts[:at]
    ((text, _, tokens),) = joined(ask(**arguments, stop=texts[at][1:] + texts[at + 1][:1]))
    assert text
    assert "".join(token.token for token in tokens).startswith(text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 4])
def test_completions_have_the_older_shape(client: Any, count: int, stream: bool) -> None:
    arguments: dict[str, Any] = {"model": "any", "n": 2, "seed": 1, "max_tokens": 10, "logprobs": count}
    answer = client.completions.create(
        prompt=[PROMPT, "json"], stream=stream, extra_body={"generate_kwargs": PLAIN}, **arguments
    )
    chunks = list(answer) if stream else [answer]
    for index in range(4):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        text = "".join(choice.text for choice in choices)
        parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
        offsets = [offset for part in parts for offset in part.text_offset]
        told = [
            each
            for part in parts
            for each in zip(part.tokens, part.text_offset, part.token_logprobs, part.top_logprobs, strict=True)
        ]
        assert len(told) == 10
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
        for token, offset, logprob, top in told:
            assert text[offset:].startswith(token)
            assert top[token] == logprob <= 0
            assert max(1, count) <= len(top) <= count + 1


class Size(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["a", "b"]
    weight: int = pydantic.Field(ge=-3, le=12)


class Answer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    id: uuid.UUID
    title: str = pydantic.Field(max_length=5)
    state: Literal["on", "off"]
    sizes: list[Size] = pydantic.Field(min_length=2, max_length=3)
    maybe: bool | None


def format_of(schema: object, **more: object) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


SCHEMA = Answer.model_json_schema()


def test_a_pydantic_model_comes_back_filled(client: Any) -> None:
    completion = client.chat.completions.parse(
        model="any", messages=USER, response_format=Answer, n=3, seed=3, max_tokens=400
    )
    answers = [choice.message.parsed for choice in completion.choices]
    assert all(isinstance(answer, Answer) for answer in answers)
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}
    assert answers[0] != answers[1]


@pytest.mark.parametrize(("strict", "stream"), [(True, False), (False, True), (None, False)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_its_schema(ask: Any, strict: bool | None, stream: bool, temperature: float) -> None:
    answer = ask(temperature=temperature, response_format=format_of(SCHEMA, strict=strict), seed=1, stream=stream)
    ((text, reason, _),) = joined(answer)
    assert reason == "stop"
    Answer.model_validate_json(text)


def test_any_object_can_be_asked_for(ask: Any) -> None:
    choices = ask(response_format={"type": "json_object"}, temperature=1, n=4, seed=2, max_tokens=300).choices
    whole = [choice for choice in choices if choice.finish_reason == "stop"]
    assert all(isinstance(json.loads(choice.message.content), dict) for choice in whole)
    assert all(choice.message.content.lstrip().startswith("{") for choice in choices)
    assert ask(response_format={"type": "json_object"}, max_tokens=2).choices[0].finish_reason == "length"
    assert ask(response_format={"type": "text"}, max_tokens=5).choices[0].message.content


def test_formats_go_with_logprobs_penalties_and_stop_texts(ask: Any) -> None:
    options = {"logprobs": True, "top_logprobs": 2, "frequency_penalty": 1, "stop": "state"}
    (choice,) = ask(response_format=format_of(SCHEMA), **options).choices
    assert choice.finish_reason == "stop"
    assert choice.message.content.rstrip().endswith('"')
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).startswith(choice.message.content.encode())
    assert all(math.isfinite(token.logprob) for token in choice.logprobs.content)


@pytest.mark.parametrize("limit", [2**53 - 1, 2**53, 2**63 - 1])
def test_the_bounds_of_a_language_s_integers_are_none(ask: Any, limit: int) -> None:
    """Zod's `.int()` and pydantic's int64 send them."""
    number = {"type": "integer", "minimum": -limit, "maximum": limit}
    schema = {"type": "object", "properties": {"x": number}, "required": ["x"], "additionalProperties": False}
    for choice in ask(response_format=format_of(schema), max_tokens=200, temperature=1, seed=1, n=3).choices:
        assert choice.finish_reason == "stop"
        assert abs(json.loads(choice.message.content)["x"]) <= limit


@cases
def test_what_is_wrong_or_not_supported_is_refused_by_name(
    ask: Any, param: str | None, arguments: dict[str, Any], sentence: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**arguments, stream=stream)
        body = caught.value.body
        assert isinstance(body, dict)
        assert set(body) == {"message", "type", "param", "code"}
        assert (body["type"], body["param"]) == ("invalid_request_error", param)
        assert sentence in body["message"]
