"""What the fields of ``/v1`` mean: each is the parameter that another server calls so, and room is what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.pipeline.chat_template import ChatTemplate
from tests.api.conftest import CHAT, COMPLETIONS, GREEDY, PROMPT, USER, Running, chunks, loader, ready

ENDLESS = {"generate_kwargs": {"eos_token_id": -1}}
LONG = "json dumps " * 3000
TOO_LONG = "but this model's maximum context length is 4096 tokens"


@pytest.mark.parametrize(
    ("body", "kwargs"),
    [
        ({"temperature": 1, "top_k": 1}, {}),
        ({"temperature": 1, "min_p": 1}, {}),
        ({"temperature": 1, "typical_p": 0.3, "seed": 5}, {"do_sample": True, "typical_p": 0.3, "seed": 5, "top_k": 0}),
        ({"temperature": 1, "top_k": -1, "seed": 5}, {"do_sample": True, "top_k": 0, "seed": 5}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"repeat_penalty": 1.7, "repeat_last_n": -1}, {"repetition_penalty": 1.7}),
        ({"repeat_penalty": 1.7, "repeat_last_n": 0}, {}),
        ({"n_predict": 5, "max_tokens": 30}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 30}, {"max_new_tokens": 5}),
        ({"length_penalty": -3.0, "generate_kwargs": {"num_beams": 3}}, {"num_beams": 3, "length_penalty": -3.0}),
        ({"truncate_prompt_tokens": 100}, {}),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_sampler_s_field_is_the_parameter_of_chat(
    api: Running, ask_for: Any, path: str, body: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    expected = {"do_sample": False, "max_new_tokens": 12, **kwargs}
    answer = api.chat(prompt=PROMPT, return_full_text=False, generate_kwargs=expected).json()["Result"]
    assert ask_for(path, **body)["text"] == answer


def test_tokens_end_an_answer_are_banned_or_are_the_only_ones(api: Running, ask_for: Any) -> None:
    def tokens(text: str) -> list[int]:
        found: list[int] = api.client.post("/tokenize", json={"content": text}).json()["tokens"]
        return found

    the, plain = tokens("the")[-1], ask_for(**ENDLESS)
    assert ask_for(logit_bias=[[the, 100]], max_tokens=3)["text"] == " the the the"
    assert ask_for(logit_bias=[["the", 100.0]], max_tokens=3)["text"] == " the the the"
    assert ask_for(allowed_token_ids=[the], max_tokens=3)["text"] == " the the the"
    forced = {"logit_bias": {str(the): 100}}
    for banned in ({"logit_bias": [[the, False]]}, {"logit_bias": {str(the): False}}, {"bad_words": ["the"]}):
        assert "the" not in ask_for(**banned, **(forced if "bad_words" in banned else {}))["text"]
    ended = ask_for(**forced, stop_token_ids=[the])
    assert (ended["text"], ended["finish_reason"], ended["usage"]["completion_tokens"]) == ("", "stop", 1)
    assert ask_for(**forced, stop_token_ids=[the], include_stop_str_in_output=True)["text"] == " the"
    assert ask_for(**forced, stop_token_ids=[the], min_tokens=3)["usage"]["completion_tokens"] == 4
    assert ask_for(**forced, stop="the")["text"] == " "
    assert ask_for(**forced, stop="the", include_stop_str_in_output=True)["text"] == " the"
    assert ask_for(ignore_eos=True)["text"] == plain["text"]
    end = api.service.pipeline.engine.model.defaults.eos_token_ids[0]
    wants_end = {"logit_bias": {str(end): 100}}
    assert ask_for(**wants_end)["usage"]["completion_tokens"] == 1
    assert ask_for(**wants_end, min_tokens=5)["usage"]["completion_tokens"] == 6
    whole = ask_for(**wants_end, ignore_eos=True, max_tokens=3)
    assert (whole["text"], whole["usage"]["completion_tokens"]) == ("", 3)
    shown = ask_for(**wants_end, ignore_eos=True, max_tokens=3, skip_special_tokens=False)["text"]
    assert shown == api.client.post("/detokenize", json={"tokens": [end] * 3}).json()["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_may_be_shown_also_in_a_stream(api: Running, ask_for: Any, stream: bool) -> None:
    whole = ask_for(max_tokens=40, **ENDLESS)["text"]
    stop = whole[12:15]
    body = {"messages": USER, "temperature": 0, "max_tokens": 40, "stop": ["a", "b", "c", "d", "e", stop], **ENDLESS}
    body |= {"stop": [f"<{letter}>" for letter in "abcdef"] + [stop], "include_stop_str_in_output": True}
    response = api.client.post(CHAT, json=body | {"stream": stream})
    end = whole.index(stop) + len(stop)
    if not stream:
        assert response.json()["choices"][0]["message"]["content"] == whole[:end]
        return
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks(response)]
    assert "".join(pieces) == whole[:end]


def test_a_conversation_is_rendered_as_it_asks(api: Running, ask_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [*USER, {"role": "assistant", "content": "It"}]
    begun = [({}, f"{PROMPT}It"), ({"continue_final_message": True}, f"{PROMPT}It")]
    closed = [
        ({"continue_final_message": False}, f"{PROMPT}It<|end|>\n<|assistant|>\n"),
        ({"add_generation_prompt": False, "continue_final_message": False}, f"{PROMPT}It<|end|>\n<|endoftext|>"),
    ]
    for fields_, prompt in begun + closed:
        tokens = api.client.post("/tokenize", json={"messages": turns, **fields_}).json()
        assert tokens["tokens"] == api.client.post("/tokenize", json={"text": prompt}).json()["tokens"]
        answer = ask_for(messages=turns, **fields_)
        assert answer["usage"]["prompt_tokens"] == tokens["count"]
    loud = ChatTemplate("{{ messages[0].content }}{% if loud %}!{% endif %}{{ messages[0].role }}")
    monkeypatch.setattr(api.service.pipeline, "_template", loud)
    rendered = {"chat_template_kwargs": {"loud": True, "messages": []}}
    one, other = (ask_for(messages=USER, **more)["usage"]["prompt_tokens"] for more in ({}, rendered))
    assert other > one


def test_a_prompt_may_be_cut_on_either_side(api: Running, ask_for: Any) -> None:
    tokens = api.client.post("/tokenize", json={"text": LONG}).json()["tokens"]
    assert len(tokens) > 4096
    for side, kept in (("left", tokens[-50:]), ("right", tokens[:50])):
        cut = ask_for(COMPLETIONS, prompt=LONG, truncate_prompt_tokens=50, truncation_side=side, echo=True)
        assert cut["usage"]["prompt_tokens"] == 50
        assert cut["text"] == ask_for(COMPLETIONS, prompt=kept, echo=True)["text"]
    fitting = ask_for(prompt=None, messages=[{"role": "user", "content": LONG}], truncate_prompt_tokens=-1)
    assert fitting["usage"]["prompt_tokens"] == 2048 - 12, "so that `max_tokens` fit"


def test_a_prompt_may_be_computed_without_the_cache(ask_for: Any) -> None:
    cached = [
        ask_for(cache_prompt=each)["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (True, True, False)
    ]
    assert cached[1] > 0 == cached[2]


def test_the_likeliest_of_several_completions_are_returned(api: Running) -> None:
    body = {"prompt": "json", "max_tokens": 8, "seed": 3, "temperature": 1.5, "logprobs": 0, **ENDLESS}

    def asked(**more: Any) -> Any:
        return api.client.post(COMPLETIONS, json=body | more).json()

    def score(choice: dict[str, Any]) -> float:
        logprobs: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    every = sorted(asked(n=4)["choices"], key=score, reverse=True)
    best = asked(n=2, best_of=4)
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in every[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 32
    silent = asked(n=1, best_of=4, logprobs=None)["choices"]
    assert [(choice["text"], choice["logprobs"]) for choice in silent] == [(every[0]["text"], None)]
    (many,) = asked(logprobs=20)["choices"]
    assert {len(top) for top in many["logprobs"]["top_logprobs"]} <= {19, 20, 21}


# -- room


def test_a_prompt_beyond_the_context_is_refused_at_once(model_path: Path) -> None:
    with ready(loader(model_path, ctx_size=8192), max_new_tokens=0) as api:
        assert api.client.get("/v1/models").json()["data"][0]["max_model_len"] == 4096
        for more in ({}, {"max_tokens": 5}, {"max_tokens": -1}):
            body = {"messages": [{"role": "user", "content": LONG}], **more}
            error = api.client.post(CHAT, json=body).json()["error"]
            assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
            assert TOO_LONG in error["message"]
        for kwargs in ({}, {"max_length": 100_000}, {"max_new_tokens": 1}):
            response = api.chat(prompt=LONG, generate_kwargs=kwargs)
            assert response.status_code == 400
            assert TOO_LONG in response.json()["detail"]
        assert api.service.pipeline.engine.stats().prompt_tokens_total == 0, "none was queued"
        tokens = api.client.post("/tokenize", json={"text": LONG}).json()["tokens"]
        last = [api.client.post(COMPLETIONS, json={"prompt": tokens[:length], **ENDLESS}) for length in (4095, 4096)]
        assert [response.status_code for response in last] == [200, 400]
        assert last[0].json()["usage"]["completion_tokens"] == 1
        whole = api.client.post(CHAT, json={"messages": USER, "max_tokens": 10**6, "temperature": 0, **ENDLESS})
        assert whole.json()["usage"]["total_tokens"] == 4096
        cut = api.chat(prompt=PROMPT, generate_kwargs={**GREEDY, "max_new_tokens": None, "max_length": "99999"})
        assert (cut.status_code, cut.headers["x-ignored-fields"]) == (200, "generate_kwargs.max_length")
        assert "x-ignored-fields" not in api.chat(prompt=PROMPT, generate_kwargs={**GREEDY, "max_length": 9999}).headers


def test_the_context_is_what_one_sequence_can_hold(model_path: Path) -> None:
    with ready(loader(model_path, ctx_size=512)) as api:
        assert api.client.get("/v1/models/random-4k").json()["max_model_len"] == 512
        for length, status in ((511, 200), (512, 400), (600, 400)):
            response = api.client.post(COMPLETIONS, json={"prompt": [300] * length})
            assert response.status_code == status
            assert ("maximum context length is 512 tokens" in response.text) is (status == 400)


# -- the other routes


def test_texts_become_tokens_and_tokens_text_as_three_servers_call_them(api: Running) -> None:
    def tokens(**body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = api.client.post("/tokenize", json=body).json()
        return answer

    ours = tokens(text=PROMPT)
    assert ours == {"tokens": ours["tokens"], "count": len(ours["tokens"]), "max_model_len": 2048, "token_strs": None}
    assert tokens(model="m", prompt=PROMPT, add_special_tokens=False)["tokens"] == ours["tokens"]
    assert tokens(content=PROMPT, add_special=True, parse_special=True)["tokens"] == ours["tokens"]
    assert tokens(messages=USER)["tokens"] == ours["tokens"]
    assert len(tokens(content=PROMPT, parse_special=False)["tokens"]) > ours["count"]
    pieces = tokens(content="a ☃", with_pieces=True)["tokens"]
    data = b"".join(bytes(each) if isinstance(each := piece["piece"], list) else each.encode() for piece in pieces)
    assert data == " a ☃".encode()
    assert "".join(tokens(prompt="a b", return_token_strs=True)["token_strs"]) == " a b"
    for wrong in ({}, {"text": "a", "content": "a"}):
        assert "Give one of `text`" in tokens(**wrong)["detail"]
    assert "`messages` must be a list of length >= 1" in tokens(messages=[])["detail"]
    text = api.client.post("/detokenize", json={"model": "m", "tokens": ours["tokens"]}).json()
    assert text["text"] == text["prompt"] == text["content"] != ""


@pytest.mark.parametrize(
    ("lax", "strict"),
    [
        ({"return_full_text": "false", "clean_up_tokenization_spaces": "1"}, {"return_full_text": False}),
        ({"return_full_text": 0, "stream": "no"}, {"return_full_text": False}),
        (
            {"generate_kwargs": {"max_length": "30", "do_sample": "false", "num_beams": "2", "length_penalty": "0.5"}},
            {"generate_kwargs": {"max_length": 30, "do_sample": False, "num_beams": 2, "length_penalty": 0.5}},
        ),
        (
            {"generate_kwargs": {"max_new_tokens": 9.0, "do_sample": 0, "early_stopping": "yes", "num_beams": "3"}},
            {"generate_kwargs": {"max_new_tokens": 9, "do_sample": False, "early_stopping": True, "num_beams": 3}},
        ),
        (
            {"generate_kwargs": {"do_sample": "off", "eos_token_id": "-1", "max_length": " 40 ", "min_length": True}},
            {"generate_kwargs": {"do_sample": False, "eos_token_id": -1, "max_length": 40, "min_length": 1}},
        ),
    ],
)
def test_chat_reads_values_as_the_original_did(api: Running, lax: dict[str, Any], strict: dict[str, Any]) -> None:
    greedy = {"prompt": PROMPT, "generate_kwargs": GREEDY}
    answers = [api.chat(**greedy | body) for body in (lax, strict)]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize("limit", [2**53 - 1, 2**53, 2**63 - 1])
def test_the_bounds_of_a_language_s_integers_are_none(ask_for: Any, limit: int) -> None:
    """Zod's `.int()` and pydantic's int64 send them."""
    number = {"type": "integer", "minimum": -limit, "maximum": limit}
    schema = {"type": "object", "properties": {"x": number}, "required": ["x"], "additionalProperties": False}
    format_ = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": schema}}
    for path in (CHAT, COMPLETIONS):
        for seed in range(3):
            answer = ask_for(path, response_format=format_, max_tokens=200, temperature=1, seed=seed)
            assert answer["finish_reason"] == "stop"
            assert abs(json.loads(answer["text"])["x"]) <= limit
