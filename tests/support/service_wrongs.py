"""Requests that are wrong: each is refused by a sentence that names what is wrong with it."""

from __future__ import annotations

from typing import Any

from tests.support.service_client import CHAT, CHAT_COMPLETIONS, COMPLETIONS

JSON = "application/json"
_SAID = [{"role": "user", "content": "hello"}]


def _kwargs(names: str, **kwargs: Any) -> tuple[str, dict[str, Any], str, str]:
    return CHAT, {"prompt": "the cat", "generate_kwargs": kwargs}, names, JSON


def _said(names: str, **fields: Any) -> tuple[str, dict[str, Any], str, str]:
    return CHAT_COMPLETIONS, {"messages": _SAID, "max_tokens": 4} | fields, names, JSON


def _completed(names: str, **fields: Any) -> tuple[str, dict[str, Any], str, str]:
    return COMPLETIONS, {"prompt": "the cat", "max_tokens": 4} | fields, names, JSON


WRONG: list[tuple[str, dict[str, Any] | bytes, str, str]] = [
    (CHAT, {}, "prompt", JSON),
    (CHAT, {"prompt": ""}, "prompt", JSON),
    (CHAT, {"prompt": 5}, "prompt", JSON),
    (CHAT, {"prompt": "a", "messages": _SAID}, "messages", JSON),
    (CHAT, {"prompt": "a", "handle_long_generation": "cut"}, "handle_long_generation", JSON),
    (CHAT, {"messages": [{"role": "emperor", "content": "a"}]}, "emperor", JSON),
    (CHAT, b'{"prompt":', "JSON", JSON),
    (CHAT, b"[" * 100_000, "", JSON),
    (CHAT, b'{"prompt": "\xff"}', "JSON", JSON),
    (CHAT, {"prompt": "a"}, "application/json", "text/plain"),
    (CHAT, b'{"prompt": "' + b"a " * 140_000 + b'"}', "--max-body-size", JSON),
    ("/chats", {"prompt": "a"}, "/chats", JSON),
    ("/healthz", {"prompt": "a"}, "/healthz", JSON),
    _kwargs("max_lenght", max_lenght=5),
    _kwargs("temperature", temperature=0, do_sample=True),
    _kwargs("temperature", temperature=-1.0),
    _kwargs("top_p", top_p=1.5),
    _kwargs("top_k", top_k=-1),
    _kwargs("typical_p", typical_p=0),
    _kwargs("max_length", max_length=1),
    _kwargs("max_length", max_length=0),
    _kwargs("max_new_tokens", max_new_tokens=0),
    _kwargs("max_new_tokens", max_new_tokens=-5),
    _kwargs("num_beams", num_beams=0),
    _kwargs("num_return_sequences", num_return_sequences=4, num_beams=2),
    _kwargs("num_return_sequences", num_return_sequences=2, do_sample=False),
    _kwargs("num_beam_groups", num_beams=4, num_beam_groups=3, diversity_penalty=1.0, do_sample=False),
    _kwargs("eos_token_id", eos_token_id=10**6),
    _kwargs("seed", seed=-1),
    _kwargs("seed", seed=2**64),
    _kwargs("stop_strings", stop_strings=[""]),
    _kwargs("penalty_alpha", penalty_alpha=0.6),
    _kwargs("max_time", max_time=-1),
    _kwargs("repetition_penalty", repetition_penalty=0),
    _kwargs("bad_words_ids", bad_words_ids=[[]]),
    _said("messages", messages=[]),
    _said("temperature", temperature=9),
    _said("tools", tools=[{"type": "function"}]),
    _said("max_tokens", max_tokens=0),
    _said("stop", stop=["a", "b", "c", "d", "e"]),
    _said("logit_bias", logit_bias={"x": 1}),
    _said("top_logprobs", top_logprobs=3),
    _said("response_format", response_format={"type": "xml"}),
    _said("logprobs", logprobs=True, generate_kwargs={"num_beams": 2, "do_sample": False}),
    _completed("prompt", prompt=[]),
    _completed("prompt[0]", prompt=[10**6]),
    _completed("prompt", prompt=["a", 5]),
    _completed("best_of", best_of=3),
    _completed("logprobs", logprobs=9),
    _completed("echo", echo=True, logprobs=1),
    _completed("n", n=0),
]
"""Path, body, what the refusal's sentence holds, and media type."""
