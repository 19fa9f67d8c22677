"""`echo` with `logprobs`, as lm-evaluation-harness asks for it; how much of the context is taken, and what is shown."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_phi3.api.openai.shown import ShownText, _text
from edge_phi3.llama.context import Context
from edge_phi3.llama.options import ContextOptions
from tests.api.conftest import CHAT, COMPLETIONS, ENDLESS, GREEDY, PROMPT, Running, loader, ready
from tests.support.cases import cases

LONGEST = 512
TEXT = "<|user|>\nWhat does json.dumps do? \u2603\U0001f600 é<|end|>\n" * 6
"""More tokens than have logits in one step, bytes of characters and special tokens among them."""
LIST = [TEXT, "json.dumps", "a"]


@pytest.fixture(scope="module")
def own(api: Running) -> Iterator[Context]:
    """A context of the service's model, all of whose tokens may have logits."""
    options = ContextOptions(batch_size=LONGEST, threads=1, kv_cache_type="f32")
    model = api.service.pipeline.engine.model.model
    with contextlib.closing(Context(model, cells=LONGEST, sequences=1, settings=options, scored=LONGEST)) as context:
        yield context


def log_softmax(context: Context, tokens: list[int]) -> NDArray[np.float64]:
    """Return the log-softmax of the model's own logits after each token of a prompt, decoded in one batch."""
    count = len(tokens)
    context.tokens[:count], context.positions[:count] = tokens, range(count)
    context.seq_ids[:count], context.wants_logits[:count] = 0, 1
    logits = context.decode(count, count).astype(np.float64)
    context.clear()
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def asked(api: Running, prompt: Any, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "echo": True, "logprobs": 3, "temperature": 0, "max_tokens": 1} | more
    response = api.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@cases
def test_they_are_the_log_softmax_of_the_models_logits(
    api: Running, own: Context, several: bool, kind: str, more: dict[str, int]
) -> None:
    by_tokens, max_tokens, top = kind == "tokens", more["max_tokens"], more["logprobs"]
    pipeline, texts = api.service.pipeline, LIST if several else LIST[:1]
    tokens = [api.tokenize(text=text)["tokens"] for text in texts]
    prompts: list[Any] = list(tokens if by_tokens else texts)
    answer = asked(api, prompts if several else prompts[0], **more)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))
    assert answer["usage"]["completion_tokens"] == max_tokens * len(texts)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    for choice, text, prompt in zip(answer["choices"], texts, tokens, strict=True):
        told, right = choice["logprobs"], log_softmax(own, prompt)
        ids = [*prompt, *right[-1:].argmax(axis=1).tolist()[:max_tokens]]
        shown = [_text(pipeline.tokenizer.bytes_of(token)) for token in ids]
        assert told["tokens"] == shown
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        places = np.arange(len(ids) - 1)
        assert told["token_logprobs"][1:] == pytest.approx(right[places, ids[1:]].tolist(), abs=1e-4)
        for row, mine, token, likeliest in zip(
            right, told["token_logprobs"][1:], shown[1:], told["top_logprobs"][1:], strict=False
        ):
            best = np.sort(row)[::-1][:top].tolist()
            assert likeliest[token] >= mine
            assert sorted(likeliest.values(), reverse=True)[: len(best)] == pytest.approx(best, abs=1e-4)
            assert max(1, top) <= len(likeliest) <= top + 1
        assert choice["text"].startswith(pipeline.tokenizer.decode(ids[:1]) if by_tokens else text)
        assert told["text_offset"] == sorted(told["text_offset"])
        assert told["text_offset"][0] == 0


def test_offsets_are_those_of_the_text(api: Running) -> None:
    """Of a text whose tokens spell it as it is."""
    prompt = "json.dumps é\U0001f600 of it"
    (choice,) = asked(api, prompt, max_tokens=3)["choices"]
    told = choice["logprobs"]
    whole = [(token, start) for token, start in zip(told["tokens"], told["text_offset"], strict=True)]
    assert whole[0] == (" j", 0)
    for token, start in whole[1:]:
        assert token.startswith("bytes:") or choice["text"][start:].startswith(token)
    assert {choice["text"][start] for token, start in whole if token.startswith("bytes:")} >= {"\U0001f600"}


def test_every_token_is_told_also_one_that_ends_the_answer(api: Running) -> None:
    end = api.service.pipeline.engine.model.defaults.eos_token_ids[0]
    (choice,) = asked(api, PROMPT, logit_bias={str(end): 100})["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(api.tokenize(text=PROMPT)["tokens"]) + 1
    assert choice["logprobs"]["text_offset"][-1] == len(PROMPT)


def test_a_prompt_is_scored_once_for_several_answers(api: Running) -> None:
    before = api.service.pipeline.engine.stats().totals.prompt
    first, *others = asked(api, PROMPT, n=3, temperature=1, seed=1, max_tokens=8)["choices"]
    count = len(api.tokenize(text=PROMPT)["tokens"])
    assert api.service.pipeline.engine.stats().totals.prompt == before + count
    scored = [choice["logprobs"]["token_logprobs"] for choice in (first, *others)]
    assert {tuple(each[:count]) for each in scored} == {tuple(scored[0][:count])}
    assert len({tuple(each[count:]) for each in scored}) == 3


def test_its_cells_are_left_for_others_and_not_taken_from_them(api: Running) -> None:
    text = "Not asked before: " + TEXT[:80]
    details = "prompt_tokens_details"
    cached = [asked(api, text, **more)["usage"][details]["cached_tokens"] for more in ({}, {"logprobs": None}, {})]
    assert cached[0] == cached[2] == 0 < cached[1]


def test_a_stop_text_cuts_the_answer_and_not_the_prompt(api: Running) -> None:
    free = asked(api, "json.dumps", max_tokens=20)["choices"][0]
    new = free["text"].removeprefix("json.dumps")
    (cut,) = asked(api, "json.dumps", max_tokens=20, stop=["json", new[8:11]])["choices"]
    assert (cut["text"], cut["finish_reason"]) == ("json.dumps" + new[:8], "stop")
    count = len(cut["logprobs"]["tokens"])
    assert len(api.tokenize(text="json.dumps")["tokens"]) < count < len(free["logprobs"]["tokens"])
    assert cut["logprobs"]["text_offset"] == free["logprobs"]["text_offset"][:count]


LONG = "json dumps " * 3000
TOO_LONG = "but this model's maximum context length is 4096 tokens"


def test_a_prompt_may_be_cut_on_either_side(api: Running, ask_for: Any) -> None:
    tokens = api.tokenize(text=LONG)["tokens"]
    assert len(tokens) > 4096
    for side, kept in (("left", tokens[-50:]), ("right", tokens[:50])):
        cut = ask_for(COMPLETIONS, prompt=LONG, truncate_prompt_tokens=50, truncation_side=side, echo=True)
        assert cut["usage"]["prompt_tokens"] == 50
        assert cut["text"] == ask_for(COMPLETIONS, prompt=kept, echo=True)["text"]
    fitting = ask_for(prompt=None, messages=[{"role": "user", "content": LONG}], truncate_prompt_tokens=-1)
    assert fitting["usage"]["prompt_tokens"] == 2048 - 12, "so that `max_tokens` fit"


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
        assert api.service.pipeline.engine.stats().totals.prompt == 0, "none was queued"
        tokens = api.tokenize(text=LONG)["tokens"]
        last = [api.client.post(COMPLETIONS, json={"prompt": tokens[:length], **ENDLESS}) for length in (4095, 4096)]
        assert [response.status_code for response in last] == [200, 400]
        assert last[0].json()["usage"]["completion_tokens"] == 1
        nearly = [{"role": "user", "content": "json dumps " * 570}]
        for limit in ({}, {"max_tokens": 10**6}):
            whole = api.client.post(CHAT, json={"messages": nearly, "temperature": 0, **limit, **ENDLESS})
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


def test_a_part_of_a_character_is_written_as_bytes() -> None:
    assert _text(b"\xe2\x98") == "bytes:\\xe2\\x98"
    assert _text("☃".encode()) == "☃"
