"""OpenAI's requests in the words of the pipeline."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.openai.fields import (
    TEXT_ONLY,
    ChatCompletionMessage,
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
)
from edge_phi3.api.openai.formats import held
from edge_phi3.api.openai.tools import use_of
from edge_phi3.api.service import Service
from edge_phi3.generation.config import LONGEST_STOP, MOST_PHRASES
from edge_phi3.pipeline import PreparedPrompt

DEFAULT_MAX_TOKENS = 16
"""Tokens of a completion when the request does not say: OpenAI's default."""

MOST_STOPS = 64
_MOST_BIAS = 100.0
_LONGEST_TOKEN = 19
"""Digits of a token id as the key of an object."""
_LAST_TOKENS = 64
"""Tokens that `repeat_penalty` looks back when the request does not say: llama-server's default."""
_PASSED = ("min_p", "typical_p", "repetition_penalty", "length_penalty")
"""Fields that are parameters of ``generate()`` as they are."""


def prepare(service: Service, request: ChatCompletionRequest | CompletionRequest, **prompt: Any) -> PreparedPrompt:
    """Prepare one prompt of a request, given as the arguments of `TextGenerationPipeline.prepare`.

    Errors are those of `Service.prepare`; a `model` that is neither an adapter nor the model's name is a
    `RefusedError`.
    """
    if not isinstance(prompt.get("prompt", ""), str):
        service.check_tokens(prompt["prompt"], "prompt")
    use = use_of(request)
    if use is not None:
        prompt["tools"] = use.tools
    if request.model and len(service.pipeline.names) > 1:
        prompt["adapter"] = service.place_of(request.model)
    top = request.logprobs
    if not isinstance(request, CompletionRequest):
        if request.top_logprobs and not request.logprobs:
            raise InvalidRequestError("`top_logprobs` needs `logprobs` to be true.")
        top = request.top_logprobs or 0 if request.logprobs else None
    kwargs, scored = _generation_kwargs(service, request), scores_prompts(request)
    only_scored = scored and kwargs["max_new_tokens"] == 0
    if only_scored:
        kwargs["max_new_tokens"] = 1
    if request.truncate_prompt_tokens is not None:
        prompt["truncate"] = _truncation(service, request, kwargs["max_new_tokens"])
    prepared = service.prepare(
        kwargs,
        fill=True,
        stop=stops_of(request),
        whole_runs=False,
        skip_special_tokens=request.skip_special_tokens is not False and use is None,  # they stand around calls
        show_stop_tokens=bool(request.include_stop_str_in_output),
        **prompt,
    ).with_config(
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repeat_penalty=request.repeat_penalty or 1.0,
        repeat_last_n=_LAST_TOKENS if request.repeat_last_n is None else request.repeat_last_n,
        cache_prompt=request.cache_prompt is not False,
        top_logprobs=0 if top is None and candidates_of(request) else top,
    )
    if prepared.config.top_logprobs is not None and prepared.config.is_beam_search:
        raise InvalidRequestError("`logprobs` and `best_of` are not supported with `num_beams` above 1.")
    if scored:
        prepared = dataclasses.replace(prepared, scored=top, only_scored=only_scored)
    return held(service, prepared, request, use)


def scores_prompts(request: ChatCompletionRequest | CompletionRequest) -> bool:
    """Return whether the log-probabilities of the prompts' own tokens are wanted."""
    wanted = isinstance(request, CompletionRequest) and bool(request.echo) and request.logprobs is not None
    if wanted and request.stream:
        raise InvalidRequestError("`echo` with `logprobs` is not supported in a stream.")
    return wanted


def candidates_of(request: SamplingFields) -> int | None:
    """Return of how many answers the likeliest are returned, or None for all."""
    wanted, best_of = request.n or 1, getattr(request, "best_of", None)
    if best_of is None or best_of == wanted:
        return None
    if best_of < wanted or request.stream:
        raise InvalidRequestError("`best_of` must be at least `n`, and equal to it in a stream.")
    return int(best_of)


def asked_by(
    service: Service, request: ChatCompletionRequest | CompletionRequest
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return a request's conversation or prompts, and for each prompt the arguments that `prepare` takes."""
    if isinstance(request, ChatCompletionRequest):
        messages = conversation_of(request.messages)
        rendering = {
            "add_generation_prompt": request.add_generation_prompt,
            "continue_final_message": request.continue_final_message,
            "chat_template_kwargs": request.chat_template_kwargs or {},
        }
        return messages, [{"messages": messages, **rendering}]
    prompts = _prompts(request, service.settings.max_queue)
    given = {"return_full_text": bool(request.echo), "add_special_tokens": request.add_special_tokens is not False}
    return prompts, [{"prompt": prompt, **given} for prompt in prompts]


def conversation_of(messages: Sequence[ChatCompletionMessage]) -> list[dict[str, Any]]:
    """Return a conversation as `ChatTemplate.render` takes it; `InvalidRequestError` where it holds more than text."""
    return [_message(f"messages[{index}].", message) for index, message in enumerate(messages)]


def _message(where: str, message: ChatCompletionMessage) -> dict[str, Any]:
    content = message.content
    if content is None and not message.tool_calls:
        raise InvalidRequestError(f"`{where}content` must be a text or a list of text parts, but is null.")
    if isinstance(content, list):
        for index, part in enumerate(content):
            if part.type != "text":
                raise InvalidRequestError(
                    f"`{where}content[{index}]` has the type {part.type[:40]!r}, which is not supported: {TEXT_ONLY}."
                )
            if part.text is None:
                raise InvalidRequestError(f"`{where}content[{index}].text` is missing.")
        content = "".join(part.text or "" for part in content)
    turn = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    if message.tool_calls:
        turn["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    return turn | ({} if message.tool_call_id is None else {"tool_call_id": message.tool_call_id})


def _prompts(request: CompletionRequest, most: int) -> list[Any]:
    """Return the prompts of a request for completions: one or more, each a text or token ids."""
    prompt = request.prompt
    if not prompt:
        raise InvalidRequestError("`prompt` is missing.")
    if isinstance(prompt, str):
        return [prompt]
    kinds, prompts = set(map(type, prompt)), list(prompt)
    if kinds == {int}:
        return [prompts]
    if int not in kinds and len(prompts) > most:
        raise InvalidRequestError(
            f"`prompt` has {len(prompts)} prompts; this service takes at most {most} at once (--max-queue)."
        )
    if len(kinds) > 1 or not all(prompts):
        raise InvalidRequestError(
            "`prompt` must be a text, token ids, a list of texts or a list of lists of token ids."
        )
    return prompts


def stops_of(request: SamplingFields) -> list[str]:
    """Return the texts before which an answer ends; too many, long or short ones are an `InvalidRequestError`."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MOST_STOPS or not all(0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise InvalidRequestError(
            f"`stop` must be a text or up to {MOST_STOPS} texts, none of them empty or longer than {LONGEST_STOP}."
        )
    return stops


def _generation_kwargs(service: Service, request: ChatCompletionRequest | CompletionRequest) -> dict[str, Any]:
    """Return the parameters of ``generate()`` for a request."""
    most = _most_tokens(request)
    if request.min_tokens and most is not None and request.min_tokens > most:
        raise InvalidRequestError(f"`min_tokens` must be at most `max_tokens` ({most}), but is {request.min_tokens}.")
    biases, banned = _biases(service, request)
    kwargs: dict[str, Any] = {name: value for name in _PASSED if (value := getattr(request, name)) is not None}
    kwargs |= {
        # null decodes greedily, and allows several (equal) answers, which false does not.
        "do_sample": None if request.temperature == 0 else True,
        "temperature": request.temperature or 1.0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": max(request.top_k or 0, 0),
        "num_return_sequences": candidates_of(request) or request.n or 1,
        "max_length": None,
        "max_new_tokens": most,
        "min_new_tokens": request.min_tokens,
        "sequence_bias": biases or None,
        "suppress_tokens": banned or None,
        "bad_words_ids": [list(word) for word in _words(service, request)] or None,
        "seed": None if request.seed in {None, -1} else request.seed % 2**64,
    }
    if request.ignore_eos or request.stop_token_ids:
        service.check_tokens(request.stop_token_ids or [], "stop_token_ids")
        own = () if request.ignore_eos else service.pipeline.engine.model.defaults.eos_token_ids
        kwargs["eos_token_id"] = [*own, *(request.stop_token_ids or ())]
    stronger = request.generate_kwargs or {}
    if stronger.get("max_length") is not None:
        kwargs["max_new_tokens"] = None  # which would win over it
    return kwargs | stronger


def _most_tokens(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    """Return the most tokens of an answer, or None for what there is room for."""
    for name in ("n_predict", "max_completion_tokens", "max_tokens"):
        value: int | None = getattr(request, name)
        if value == 0 and not scores_prompts(request):
            raise InvalidRequestError(
                f"`{name}` must be an integer >= 1, or -1 for what the context leaves, or 0 with `echo` and `logprobs`."
            )
        if value is not None:
            return None if value < 0 else value
    return None if isinstance(request, ChatCompletionRequest) else DEFAULT_MAX_TOKENS


def _truncation(service: Service, request: SamplingFields, most: int | None) -> tuple[int, str]:
    """Return how many tokens of the prompt are kept, and on which side it is cut."""
    side, kept = request.truncation_side or "left", request.truncate_prompt_tokens or 0
    if side not in {"left", "right"}:
        raise InvalidRequestError(f"`truncation_side` must be left or right, not {side[:40]!r}.")
    if kept == 0:
        raise InvalidRequestError("`truncate_prompt_tokens` must be an integer >= 1, or -1 for what leaves room.")
    return (kept if kept > 0 else max(1, service.pipeline.engine.max_length - (most or 1))), side


def _biases(service: Service, request: SamplingFields) -> tuple[list[list[Any]], list[int]]:
    """Return pairs of a phrase of one token and its bias, and the tokens that are banned."""
    pairs = request.logit_bias or {}
    if isinstance(pairs, dict):
        for text in pairs:
            if not text.isascii() or not text.isdigit() or len(text) > _LONGEST_TOKEN:
                raise InvalidRequestError(f"`logit_bias` has the key {text[:40]!r}; its keys are token ids.")
        pairs = [(int(key), bias) for key, bias in pairs.items()]
    _check_few("logit_bias", [key for key, _ in pairs if isinstance(key, str)])
    service.check_tokens([key for key, _ in pairs if isinstance(key, int)], "logit_bias")
    biases: list[list[Any]] = []
    banned: list[int] = []
    for key, bias in pairs:
        tokens = service.pipeline.tokenizer.encode(key, add_bos=False).tolist() if isinstance(key, str) else [key]
        if bias is True or not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise InvalidRequestError(
                f"`logit_bias` must lie between -{_MOST_BIAS:g} and {_MOST_BIAS:g}, or be false, but is {bias}."
            )
        if bias is False:
            banned += tokens
        else:
            biases += [[[token], float(bias)] for token in tokens]
    if request.allowed_token_ids is not None:
        service.check_tokens(request.allowed_token_ids, "allowed_token_ids")
        banned += set(range(service.pipeline.model.vocab_size)).difference(request.allowed_token_ids)
    return biases, banned


def _check_few(name: str, texts: Sequence[str]) -> None:
    if len(texts) > MOST_PHRASES:
        raise InvalidRequestError(f"`{name}` must hold at most {MOST_PHRASES} texts, but holds {len(texts)}.")


def _words(service: Service, request: SamplingFields) -> Iterator[tuple[int, ...]]:
    """Yield the tokens of `bad_words`: of each at the beginning of a text and, where they differ, after a space."""
    _check_few("bad_words", request.bad_words or ())
    encode = service.pipeline.tokenizer.encode
    for word in request.bad_words or ():
        alone, after = (tuple(encode(text, add_bos=False).tolist()) for text in (word, f" {word.lstrip()}"))
        if not alone:
            raise InvalidRequestError("`bad_words` must be a list of texts, none of them empty.")
        yield alone
        if len(after) == len(alone) and after != alone:
            yield after
