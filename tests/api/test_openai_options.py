"""Penalties, log-probabilities and formats, asked with OpenAI's own client."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from edge_phi3.api.openai.shown import _text
from tests.api.conftest import GREEDY_CHAT as GREEDY
from tests.api.conftest import PROMPT, USER, Running, joined

PLAIN: dict[str, Any] = {"suppress_tokens": [*range(259), *range(501, 2000)], "eos_token_id": -1}
"""Answers of ordinary pieces (no bytes, no special tokens) up to their greatest length."""


# -- penalties


@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 1.5), (1.0, 0.5), (-2.0, -1.0)])
def test_penalties_follow_the_formula(client: Any, presence: float, frequency: float) -> None:
    answer = client.chat.completions.create(
        **GREEDY, presence_penalty=presence, frequency_penalty=frequency, max_tokens=60, logprobs=True, top_logprobs=20,
        extra_body={"generate_kwargs": {"eos_token_id": -1}},
    ).choices[0].logprobs  # fmt: skip
    counts: dict[bytes, int] = {}

    def penalised(logprob: float, data: list[int] | None) -> float:
        count = counts.get(bytes(data or ()), 0)
        return logprob - count * frequency - (presence if count else 0)

    changed = 0
    for token in answer.content:
        best = max(penalised(other.logprob, other.bytes) for other in token.top_logprobs)
        assert penalised(token.logprob, token.bytes) >= best - 1e-4
        changed += token.token != token.top_logprobs[0].token
        counts[bytes(token.bytes or ())] = counts.get(bytes(token.bytes or ()), 0) + 1
    assert changed > 0


# -- log-probabilities


def test_logprobs_are_those_of_the_model(api: Running, client: Any) -> None:
    choice = client.chat.completions.create(
        **GREEDY, max_tokens=12, logprobs=True, top_logprobs=3, extra_body={"generate_kwargs": {"eos_token_id": -1}}
    ).choices[0]
    kwargs = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": -1}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    scores = api.client.post("/chat", json={"messages": USER, "generate_kwargs": kwargs}).json()["scores"][0]
    tokens = choice.logprobs.content
    assert [token.logprob for token in tokens] == pytest.approx([score["logprob"] for score in scores], abs=1e-4)
    for token in tokens:
        first, *_ = token.top_logprobs
        assert (first.token, first.logprob) == (token.token, token.logprob)
        logprobs = [other.logprob for other in token.top_logprobs]
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)


def test_a_bias_and_a_temperature_do_not_change_them(api: Running, client: Any) -> None:
    token = api.client.post("/tokenize", json={"text": "the"}).json()["tokens"][-1]
    plain = client.chat.completions.create(**GREEDY, max_tokens=1, logprobs=True, top_logprobs=20).choices[0].logprobs
    forced = client.chat.completions.create(
        **(GREEDY | {"temperature": 2}), max_tokens=1, logprobs=True, top_logprobs=20, logit_bias={str(token): 100}
    ).choices[0].logprobs  # fmt: skip
    (one,), (other,) = plain.content, forced.content
    assert other.token != one.token
    assert other.logprob < -1
    assert [each.token for each in other.top_logprobs] == [each.token for each in one.top_logprobs]


@pytest.mark.parametrize("stop", [None, "used"])
def test_a_stream_tells_the_same_as_one_body(client: Any, stop: str | None) -> None:
    arguments: dict[str, Any] = {
        "model": "any", "messages": USER, "n": 3, "seed": 5, "max_tokens": 40, "logprobs": True, "top_logprobs": 2,
        "extra_body": {"generate_kwargs": {"eos_token_id": -1}},
    }  # fmt: skip
    if stop:
        text = client.chat.completions.create(**arguments).choices[1].message.content
        arguments["stop"] = text[20:23]
    whole = joined(client.chat.completions.create(**arguments))
    streamed = joined(client.chat.completions.create(stream=True, **arguments))
    assert [text for text, _, _ in streamed] == [text for text, _, _ in whole]
    for (_, _, tokens), (_, _, others) in zip(streamed, whole, strict=True):
        assert [token.bytes for token in tokens] == [other.bytes for other in others]
        for token, other in zip(tokens, others, strict=True):
            # The same to the last bits, which depend on where llama.cpp keeps a sequence.
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert len(token.top_logprobs) == len(other.top_logprobs) == 2
    lengths = [len(tokens) for _, _, tokens in streamed]
    assert lengths[1] < 40 if stop else min(lengths) > 30


def test_tokens_that_a_stop_text_cuts_off_are_not_told(client: Any) -> None:
    arguments: dict[str, Any] = GREEDY | {"max_tokens": 40, "logprobs": True, "extra_body": {"generate_kwargs": PLAIN}}
    ((_, _, tokens),) = joined(client.chat.completions.create(**arguments))
    texts = [token.token for token in tokens]
    at = next(place for place in range(5, 40) if len(texts[place]) > 1 and texts[place] not in "".join(texts[:place]))
    ((text, reason, tokens),) = joined(client.chat.completions.create(**arguments, stop=texts[at]))
    assert (text, reason) == ("".join(texts[:at]), "stop")
    assert [token.token for token in tokens] == texts[:at]
    ((text, _, tokens),) = joined(client.chat.completions.create(**arguments, stop=texts[at][1:] + texts[at + 1][:1]))
    assert text
    assert "".join(token.token for token in tokens).startswith(text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 4])
def test_completions_have_the_older_shape(client: Any, count: int, stream: bool) -> None:
    answer = client.completions.create(
        model="any", prompt=[PROMPT, "json"], n=2, seed=1, max_tokens=10, logprobs=count, stream=stream,
        extra_body={"generate_kwargs": PLAIN},
    )  # fmt: skip
    chunks = list(answer) if stream else [answer]
    for index in range(4):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        text = "".join(choice.text for choice in choices)
        parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
        tokens = [token for part in parts for token in part.tokens or []]
        offsets = [offset for part in parts for offset in part.text_offset or []]
        logprobs = [logprob for part in parts for logprob in part.token_logprobs or []]
        top = [each for part in parts for each in part.top_logprobs or []]
        assert len(tokens) == len(offsets) == len(logprobs) == len(top) == 10
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
        for token, offset, logprob, each in zip(tokens, offsets, logprobs, top, strict=True):
            assert text[offset:].startswith(token)
            assert each[token] == logprob <= 0
            assert max(1, count) <= len(each) <= count + 1


def test_a_part_of_a_character_is_written_as_bytes() -> None:
    assert _text(b"\xe2\x98") == "bytes:\\xe2\\x98"
    assert _text("☃".encode()) == "☃"


def test_logprobs_at_odds_with_others_are_refused_in_completions_too(client: Any) -> None:
    for arguments in ({"logprobs": 1, "echo": True}, {"logprobs": 6}):
        with pytest.raises(openai.BadRequestError, match="`logprobs`"):
            client.completions.create(model="any", prompt="json", **arguments)
    assert client.chat.completions.create(**GREEDY, max_tokens=1, logprobs=False).choices[0].logprobs is None


# -- formats


class Inner(pydantic.BaseModel):
    kind: Literal["a", "b"]
    weight: int = pydantic.Field(ge=1, le=20)


class Answer(pydantic.BaseModel):
    title: str = pydantic.Field(max_length=5)
    inner: Inner
    others: list[Inner] = pydantic.Field(max_length=2)
    maybe: bool | None


def test_a_pydantic_model_comes_back_filled(client: Any) -> None:
    completion = client.chat.completions.parse(
        model="any", messages=USER, response_format=Answer, n=3, seed=3, max_tokens=400
    )
    answers = [choice.message.parsed for choice in completion.choices]
    assert all(isinstance(answer, Answer) for answer in answers)
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}
    assert answers[0] != answers[1]


def format_of(schema: object, **more: object) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "state": {"enum": ["on", "off"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 12}, "minItems": 2,
                  "maxItems": 3},
    },
    "required": ["id", "state", "sizes"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(("strict", "stream"), [(True, False), (False, True), (None, False)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_follows_its_schema(client: Any, strict: bool | None, stream: bool, temperature: float) -> None:
    arguments = GREEDY | {"temperature": temperature, "response_format": format_of(SCHEMA, strict=strict)}
    answer = client.chat.completions.create(**arguments, seed=1, stream=stream)
    ((text, reason, _),) = joined(answer)
    assert reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)


def test_any_object_can_be_asked_for(client: Any) -> None:
    arguments: dict[str, Any] = {"model": "any", "messages": USER, "response_format": {"type": "json_object"}}
    choices = client.chat.completions.create(**arguments, n=4, seed=2, max_tokens=300).choices
    whole = [choice for choice in choices if choice.finish_reason == "stop"]
    assert all(isinstance(json.loads(choice.message.content or ""), dict) for choice in whole)
    assert all((choice.message.content or "").lstrip().startswith("{") for choice in choices)
    short = client.chat.completions.create(**arguments, max_tokens=2).choices[0]
    assert short.finish_reason == "length"
    text = client.chat.completions.create(**GREEDY, max_tokens=5, response_format={"type": "text"})
    assert text.choices[0].message.content


def test_formats_go_with_logprobs_penalties_and_stop_texts(client: Any) -> None:
    choice = client.chat.completions.create(
        **GREEDY, response_format=format_of(SCHEMA), logprobs=True, top_logprobs=2, frequency_penalty=1, stop="state"
    ).choices[0]
    assert choice.finish_reason == "stop"
    assert (choice.message.content or "").rstrip().endswith('"')
    assert "".join(token.token for token in choice.logprobs.content).startswith(choice.message.content or "?")
    assert all(math.isfinite(token.logprob) for token in choice.logprobs.content)


BEAMS = {"extra_body": {"generate_kwargs": {"num_beams": 2, "do_sample": False}}}
ENDLESS = {"extra_body": {"generate_kwargs": {"eos_token_id": -1}}}
SILENT = {"extra_body": {"generate_kwargs": {"suppress_tokens": list(range(100_000))}}}
OBJECT = {"type": "json_object"}
NOT = {"properties": {"a": {"type": "string", "not": {"const": "x"}}}}
NO_SCHEMA = "`response_format.json_schema.schema` is missing."
CANNOT = "`response_format.json_schema.schema` cannot be followed"


@pytest.mark.parametrize(
    ("arguments", "param", "sentence"),
    [
        ({"top_logprobs": 3}, "top_logprobs", "`top_logprobs` needs `logprobs` to be true."),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "`top_logprobs` must be"),
        ({"logprobs": True, **BEAMS}, "logprobs", "num_beams"),
        (
            {"response_format": {"type": "xml"}},
            "response_format",
            "must be text, json_object or json_schema, not 'xml'.",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", NO_SCHEMA),
        ({"response_format": format_of(None)}, "response_format", NO_SCHEMA),
        ({"response_format": format_of({"type": "wrong"})}, "response_format", f"{CANNOT}: Invalid type: wrong."),
        ({"response_format": format_of(NOT)}, "response_format", '["not"]'),
        ({"response_format": format_of({"$ref": "#"})}, "response_format", CANNOT),
        ({"response_format": OBJECT, **BEAMS}, "response_format", "num_beams"),
        ({"response_format": OBJECT, **ENDLESS}, "response_format", "eos_token_id"),
        ({"response_format": OBJECT, **SILENT}, "logit_bias", "leaves no token"),
    ],
)
def test_options_that_are_wrong_or_at_odds_are_refused_by_name(
    client: Any, arguments: dict[str, Any], param: str, sentence: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**GREEDY, **arguments, stream=stream)
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["param"] == param
        assert sentence in caught.value.body["message"]
