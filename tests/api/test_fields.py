"""Bodies as real clients send them, and what each field of OpenAI's, vLLM's and llama-server's does."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
from openai.types import chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from edge_phi3.api import body as body_module
from edge_phi3.api.openai import fields
from tests.api.conftest import CHAT, COMPLETIONS, DATA, USER, Running, chunks, recorded


@pytest.mark.parametrize(
    ("name", "path", "status", "ignored"),
    [
        *(("01", path, 200, ignored) for path, ignored in ((CHAT, ""), ("/chat", "max_tokens, temperature"))),
        *((name, CHAT, 200, "") for name in ("02", "04", "05", "11", "22")),
        *((name, COMPLETIONS, 200, "") for name in ("03", "13")),
        ("12", CHAT, 200, "num_ctx"),
        ("24", CHAT, 200, "reasoning_effort"),
        ("27", "/tokenize", 200, ""),
        ("28", "/chat", 200, "temperature, max_tokens"),
        ("29", "/chat", 200, ""),
        ("07", CHAT, 400, "`tools`"),
        ("09", CHAT, 400, "`messages[1].tool_calls`"),
        ("26", CHAT, 400, "`tool_choice`"),
        ("32", CHAT, 400, "`response_format`"),
        ("10", "/v1/responses", 404, "/v1/responses"),
    ],
)
def test_a_recorded_body_is_answered_or_refused_by_name(
    api: Running, name: str, path: str, status: int, ignored: str
) -> None:
    response = api.client.post(path, json=recorded(name))
    assert response.status_code == status, response.text
    if status == 200:
        assert response.headers.get("x-ignored-fields", "") == ignored
    else:
        assert ignored in response.text


@pytest.mark.parametrize("name", ["04", "05"])
def test_what_benchmarks_send_counts_every_token(api: Running, name: str) -> None:
    """Their answers never end before `max_tokens`; with `continuous_usage_stats` every chunk has the counts so far."""
    found = chunks(api.client.post(CHAT, json=recorded(name) | {"temperature": 0}))
    assert found[-1]["choices"] == []
    usage = [chunk["usage"] for chunk in found]
    assert (usage[-1]["completion_tokens"], found[-2]["choices"][0]["finish_reason"]) == (16, "length")
    if name == "04":
        assert set(map(json.dumps, usage[:-1])) == {"null"}
        return
    counts = [each["completion_tokens"] for each in usage]
    assert (counts[0], counts[-2]) == (0, 16)
    assert counts == sorted(counts)
    assert {each["total_tokens"] - each["completion_tokens"] for each in usage} == {usage[-1]["prompt_tokens"]}


def test_every_field_of_the_three_servers_is_in_the_table() -> None:
    known = {
        *fields.OTHERS,
        *fields.ChatCompletionRequest.__struct_fields__,
        *fields.CompletionRequest.__struct_fields__,
    }
    names = json.loads((DATA / "fields.json").read_text(encoding="utf-8"))
    of_openai = {
        *get_type_hints(chat_create_params.CompletionCreateParamsStreaming),
        *get_type_hints(completion_create_params.CompletionCreateParamsStreaming),
    }
    for wanted in (of_openai, names["vllm"].split(), names["llama-server"].split()):
        assert len(known & set(wanted)) > 15
        assert set(wanted) - known == set()
    for type_, params in (
        (fields.ChatCompletionMessage, (chat.ChatCompletionAssistantMessageParam, chat.ChatCompletionToolMessageParam)),
        (fields.ContentPart, (chat.ChatCompletionContentPartTextParam,)),
        (fields.StreamOptions, (chat.ChatCompletionStreamOptionsParam,)),
    ):
        inside = {*type_.__struct_fields__, *fields.NESTED[type_]}
        assert {name for each in params for name in get_type_hints(each)} - inside == set()


def test_what_is_in_no_table_is_named_in_the_header_and_once_in_the_log(
    api: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    log = SimpleNamespace(warning=lambda _, **facts: logged.append(facts["fields"]))
    monkeypatch.setattr(body_module, "logger", log)
    monkeypatch.setattr(body_module, "_logged", set())
    messages = [{**USER[0], "mood": "good", "name": "n", "id": "1", "cache_control": {}}]
    quiet = {"user": "u", "metadata": {}, "chat_id": "c", "session_id": "s", "store": False, "prediction": {"a": 1}}
    body = {"messages": messages, "max_tokens": 1, "grüße, \n": 1, "num_ctx": 7, "stream_options": {"x": 1}, **quiet}
    found = [api.client.post(CHAT, json=body) for _ in range(2)]
    many = api.client.post(CHAT, json={f"{index:02d}{'é' * 100}": 0 for index in range(40)} | body)
    shown = r"gr\xfc\xdfe\x2c \n, num_ctx, stream_options.x, messages[].mood"
    assert {(each.status_code, each.headers["x-ignored-fields"]) for each in found} == {(200, shown)}
    names = many.headers["x-ignored-fields"].split(", ")
    assert (len(names), {len(name) for name in names}) == (16, {64})
    assert names[0].startswith(r"00\xe9\xe9")
    assert logged == [shown, ", ".join(names)]


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        (CHAT, {"num_beams": 2}, "`num_beams` belongs inside `generate_kwargs`."),
        (CHAT, {"guidance_scale": 2}, "`guidance_scale` is not supported"),
        (CHAT, {"mirostat": 2}, "`mirostat` is not supported"),
        (CHAT, {"prompt_logprobs": 0}, "`prompt_logprobs` is not supported"),
        (CHAT, {"echo": True}, "`echo` is not supported: it is a field of completions."),
        (COMPLETIONS, {"top_logprobs": 3}, "`top_logprobs` is not supported"),
        (COMPLETIONS, {"suffix": "x"}, "`suffix` is not supported"),
        (COMPLETIONS, {"cache_salt": "x"}, "`cache_salt` is not supported"),
        (COMPLETIONS, {"best_of": 2, "n": 3}, "`best_of` must be at least `n`"),
        (COMPLETIONS, {"best_of": 2, "stream": True}, "`best_of` must be at least `n`, and equal to it in a stream."),
        (COMPLETIONS, {"logprobs": 21}, "`logprobs` must be an integer <= 20"),
        (CHAT, {"min_tokens": 20}, "`min_tokens` must be at most `max_tokens` (12), but is 20."),
        (CHAT, {"max_tokens": -2}, "`max_tokens` must be an integer >= -1"),
        (CHAT, {"stop_token_ids": [10**6]}, "`stop_token_ids[0]` must be a token id"),
        (CHAT, {"allowed_token_ids": [10**6]}, "`allowed_token_ids[0]` must be a token id"),
        (CHAT, {"bad_words": [""]}, "`bad_words` must be"),
        (CHAT, {"logit_bias": [[5, True]]}, "`logit_bias` must lie between"),
        (CHAT, {"logit_bias": [[5]]}, "`logit_bias"),
        (CHAT, {"truncate_prompt_tokens": 0}, "`truncate_prompt_tokens` must be"),
        (CHAT, {"truncate_prompt_tokens": 3, "truncation_side": "up"}, "`truncation_side` must be left or right"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "`add_generation_prompt` must not"),
    ],
)
def test_what_would_change_the_answer_and_cannot_be_had_is_refused(
    api: Running, path: str, body: dict[str, Any], sentence: str
) -> None:
    given = {"messages": USER} if path == CHAT else {"prompt": "json"}
    response = api.client.post(path, json={**given, "max_tokens": 12, **body})
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_asks_for_nothing_is_taken_in_silence(api: Running, path: str) -> None:
    nothing = {"mirostat": 0, "dry_multiplier": 0.0, "lora": [], "grammar": "", "use_beam_search": False, "n_cmpl": 1}
    nothing |= {"top_n_sigma": -1, "tools": None, "priority": None, "n_probs": 0, "samplers": [], "vllm_xargs": {}}
    given = {"messages": USER} if path == CHAT else {"prompt": "json"}
    response = api.client.post(path, json=given | nothing | {"max_tokens": 1})
    assert (response.status_code, response.headers.get("x-ignored-fields")) == (200, None), response.text
