"""OpenAI's API, asked with OpenAI's own client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from edge_phi3.api.openai.shown import ShownText
from tests import paced
from tests.api.conftest import GREEDY_CHAT, PROMPT, USER, Clock, Running, joined, loader, openai_client, ready

COMPLETION: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 8}


def greedy(api: Running, **kwargs: Any) -> str:
    """Ask `/chat` the same question."""
    body = {"messages": USER, "generate_kwargs": {"do_sample": False, **kwargs}}
    result: str = api.client.post("/chat", json=body).json()["Result"]
    return result


def test_a_conversation_is_answered_as_by_chat(api: Running, client: Any) -> None:
    completion = client.chat.completions.create(**GREEDY_CHAT, max_completion_tokens=12)
    (choice,) = completion.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content == greedy(api, max_new_tokens=12)
    assert (completion.model, completion.object) == ("random-4k", "chat.completion")
    usage = completion.usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12


def test_a_stream_holds_the_same_text_and_the_usage(api: Running, client: Any) -> None:
    usage = {"include_usage": True}
    chunks = list(client.chat.completions.create(**GREEDY_CHAT, max_tokens=24, stream=True, stream_options=usage))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [found[:2] for found in joined(chunks)] == [(greedy(api, max_new_tokens=24), "length")]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_several_answers_are_drawn_with_a_seed(client: Any) -> None:
    def ask(seed: int) -> list[str | None]:
        completion = client.chat.completions.create(
            model="any", messages=USER, n=3, seed=seed, max_tokens=10, temperature=1.5, top_p=0.9
        )
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        return [choice.message.content for choice in completion.choices]

    first = ask(7)
    assert len(set(first)) == 3
    assert ask(7) == first
    assert ask(-8) != first


def test_several_greedy_answers_are_equal(client: Any) -> None:
    one, other = client.chat.completions.create(**GREEDY_CHAT, n=2, max_tokens=5).choices
    assert one.message.content == other.message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text(api: Running, client: Any, stream: bool) -> None:
    whole = greedy(api, max_new_tokens=40)
    stop = whole[12:15]
    answer = client.chat.completions.create(**GREEDY_CHAT, max_tokens=40, stop=["never there", stop], stream=stream)
    assert [found[:2] for found in joined(answer)] == [(whole[: whole.index(stop)], "stop")]


def test_a_bias_bans_or_forces_a_token(api: Running, client: Any) -> None:
    token = api.client.post("/tokenize", json={"text": "the"}).json()["tokens"][-1]
    forced = client.chat.completions.create(**GREEDY_CHAT, logit_bias={str(token): 100}, max_tokens=4)
    text = api.client.post("/detokenize", json={"tokens": [token] * 4}).json()["text"]
    assert forced.choices[0].message.content == f" {text}"


def test_messages_may_come_in_parts_and_from_developers(client: Any) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]},
    ]
    one, other = (client.chat.completions.create(messages=each, **COMPLETION).choices[0] for each in (plain, parts))
    assert one.message.content == other.message.content


def test_an_answer_without_a_limit_takes_the_room_there_is(client: Any) -> None:
    completion = client.chat.completions.create(**GREEDY_CHAT, extra_body={"generate_kwargs": {"eos_token_id": -1}})
    # The model's context: 2,048 cells are enough for it, since the sliding window lets go of all but 2,047.
    assert completion.usage.total_tokens == 4096


@pytest.mark.parametrize("kwargs", [{"num_beams": 3, "do_sample": False, "max_new_tokens": 12}, {"max_new_tokens": 3}])
def test_parameters_of_chat_may_be_given_beside_openai_s(api: Running, client: Any, kwargs: dict[str, Any]) -> None:
    completion = client.chat.completions.create(**GREEDY_CHAT, extra_body={"generate_kwargs": kwargs})
    assert completion.choices[0].message.content == greedy(api, **kwargs)


def test_prompts_are_continued(api: Running, client: Any) -> None:
    completion = client.completions.create(prompt=PROMPT, **COMPLETION)
    assert completion.choices[0].text == greedy(api, max_new_tokens=8)
    echoed = client.completions.create(prompt=PROMPT, echo=True, **COMPLETION)
    assert echoed.choices[0].text == PROMPT + completion.choices[0].text
    endless = {"generate_kwargs": {"eos_token_id": -1}}
    default = client.completions.create(model="any", prompt=PROMPT, temperature=0, extra_body=endless)
    assert default.usage.completion_tokens == 16


def test_a_prompt_may_come_as_tokens(api: Running, client: Any) -> None:
    texts = [PROMPT, "json"]
    tokens = [api.client.post("/tokenize", json={"text": text}).json()["tokens"] for text in texts]
    by_text = client.completions.create(prompt=texts, echo=True, **COMPLETION)
    by_tokens = client.completions.create(prompt=tokens, **COMPLETION)
    for text, choice in zip(texts, by_text.choices, strict=True):
        assert choice.text == text + by_tokens.choices[choice.index].text
    alone = client.completions.create(prompt=tokens[0], echo=True, **COMPLETION)
    decoded = api.client.post("/detokenize", json={"tokens": tokens[0]}).json()["text"]
    assert alone.choices[0].text == decoded + by_tokens.choices[0].text
    assert alone.usage.prompt_tokens == len(tokens[0])
    with pytest.raises(openai.BadRequestError, match="token id from 0 to"):
        client.completions.create(prompt=[10**6], **COMPLETION)
    prompts: tuple[Any, ...] = ([1, "a"], ["a", [1]], [[]], [])
    for mixed in prompts:
        with pytest.raises(openai.BadRequestError, match="`prompt`"):
            client.completions.create(prompt=mixed, **COMPLETION)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_one_list_of_choices(client: Any, stream: bool) -> None:
    prompts = ["json", "os.path", "re"]
    alone = [client.completions.create(prompt=prompt, n=2, **COMPLETION).choices for prompt in prompts]
    expected = [choice.text for choices in alone for choice in choices]
    answer = client.completions.create(prompt=prompts, n=2, stream=stream, **COMPLETION)
    assert [text for text, _, _ in joined(answer)] == expected


def test_the_model_is_listed_and_described(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["random-4k"]
    assert client.models.retrieve("random-4k").object == "model"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("arguments", "param", "sentence"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "`tools` is not supported"),
        ({"modalities": ["audio"]}, "modalities", "`modalities` is not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "is not supported"),
        ({"temperature": 3}, "temperature", "`temperature` must be a number <= 2.0"),
        ({"top_p": 0}, "top_p", "`top_p` must be"),
        ({"n": 0}, "n", "`n` must be"),
        ({"presence_penalty": 2.5}, "presence_penalty", "must be"),
        ({"frequency_penalty": -3}, "frequency_penalty", "must be"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4 texts"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"7": 101}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"999999": 1}}, "sequence_bias", "vocabulary"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean `temperature`?"),
        ({"extra_body": {"top_k": 3}}, "top_k", "belongs inside `generate_kwargs`"),
        ({"messages": []}, "messages", "`messages` must be a list of length >= 1"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, None, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages", "messages[0].tool_calls"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: Any, arguments: dict[str, Any], param: str | None, sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**({"model": "any", "messages": USER} | arguments))
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert (caught.value.body["type"], caught.value.body["param"]) == ("invalid_request_error", param)
    assert sentence in caught.value.body["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"tools": [], "tool_choice": "none", "store": False, "service_tier": "auto", "user": "u", "metadata": {}},
        {"messages": [{"role": "user", "content": "a", "name": "n"}], "modalities": ["text"]},
    ],
)
def test_what_asks_for_nothing_is_accepted(client: Any, arguments: dict[str, Any]) -> None:
    client.chat.completions.create(**({"model": "any", "messages": USER, "max_tokens": 1} | arguments))


def test_errors_have_openai_s_shape_and_classes(model_path: Path) -> None:
    with ready(loader(model_path), api_key=["right"], max_new_tokens=5) as api:
        with openai_client(api, "wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with openai_client(api, "right") as client:
            assert client.chat.completions.create(model="any", messages=USER).usage is not None
            with pytest.raises(openai.BadRequestError, match="--max-new-tokens"):
                client.chat.completions.create(model="any", messages=USER, max_tokens=6)


def test_a_stream_that_runs_out_of_time_raises_in_the_client(model_path: Path, clock: Clock) -> None:
    endless = {"generate_kwargs": {"eos_token_id": -1}}
    with ready(loader(model_path), request_timeout=60) as api, openai_client(api) as client, paced.slowly():
        stream = client.chat.completions.create(model="any", messages=USER, stream=True, extra_body=endless)
        next(stream)
        clock.now += 61
        with pytest.raises(openai.APIError, match="time limit"):
            list(stream)


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["ab", "cd"], [], ["ab", "cd"]),
        (["ab", "cd"], ["bc"], ["a", ""]),
        (["ab", "xd"], ["bc"], ["a", "bxd"]),
        (["aab", "aac"], ["aac"], ["aab", ""]),
        (["xaa", "aab"], ["aab"], ["x", "aa"]),
        (["a", "b", "c", "d"], ["bcd", "cz"], ["a", "", "", ""]),
        (["one two"], ["two", "one"], [""]),
    ],
)
def test_a_stop_text_is_never_shown_in_part(pieces: list[str], stops: list[str], shown: list[str]) -> None:
    streamed, whole = ShownText(stops), ShownText(stops)
    assert [streamed.push(piece) for piece in pieces] == shown
    rest = streamed.push("", last=True)
    assert "".join(shown) + rest == whole.push("".join(pieces), last=True)
    assert streamed.stopped == whole.stopped == any(stop in "".join(pieces) for stop in stops)
