"""How much of the context a prompt and its answer may take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.api.conftest import CHAT, COMPLETIONS, ENDLESS, GREEDY, PROMPT, Running, loader, ready

LONG = "json dumps " * 3000
TOO_LONG = "but this model's maximum context length is 4096 tokens"


def test_a_prompt_may_be_cut_on_either_side(api: Running, ask_for: Any) -> None:
    tokens = api.client.post("/tokenize", json={"text": LONG}).json()["tokens"]
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
        assert api.service.pipeline.engine.stats().prompt_tokens_total == 0, "none was queued"
        tokens = api.client.post("/tokenize", json={"text": LONG}).json()["tokens"]
        last = [api.client.post(COMPLETIONS, json={"prompt": tokens[:length], **ENDLESS}) for length in (4095, 4096)]
        assert [response.status_code for response in last] == [200, 400]
        assert last[0].json()["usage"]["completion_tokens"] == 1
        nearly = [{"role": "user", "content": "json dumps " * 1990}]
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
