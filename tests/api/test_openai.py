"""OpenAI's API, asked with OpenAI's own client: what is answered, whole and in a stream."""

from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from edge_phi3.api.openai.shown import ShownText
from edge_phi3.conversion.convert import convert
from tests import paced
from tests.api.conftest import PROMPT, USER, Clock, Running, greedy, joined, loader, openai_client, ready, spelling
from tests.golden.family import write_member

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


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_a_stop_text_is_never_shown_in_part(pieces: list[str], stops: list[str]) -> None:
    text, shown = "".join(pieces), ShownText(stops)
    end = min((text.index(stop) for stop in stops if stop in text), default=len(text))
    told = "".join(map(shown.push, pieces))
    kept = text[len(told) : end]
    assert text[:end].startswith(told)
    assert not kept or any(stop.startswith(kept) for stop in stops), "what cannot begin a stop text is shown at once"
    assert told + shown.push("", last=True) == text[:end]
    assert shown.stopped is any(stop in text for stop in stops)
