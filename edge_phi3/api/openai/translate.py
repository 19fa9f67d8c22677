"""OpenAI's requests in the words of the pipeline, and what of them is refused."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, get_type_hints

from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.openai.schemas import (
    TEXT_ONLY,
    ChatCompletionMessage,
    ChatCompletionRequest,
    CompletionRequest,
    ResponseFormat,
    SamplingFields,
)
from edge_phi3.api.service import Service
from edge_phi3.engine.errors import SchemaError
from edge_phi3.pipeline import PreparedPrompt

DEFAULT_MAX_TOKENS = 16
"""Tokens of a completion when the request does not say: OpenAI's default."""

_MOST_STOPS = 4
_MOST_BIAS = 100.0
_SCHEMA = "response_format.json_schema.schema"


def prepare(service: Service, request: ChatCompletionRequest | CompletionRequest, **prompt: Any) -> PreparedPrompt:
    """Prepare one prompt of a request, given as the arguments of `TextGenerationPipeline.prepare`.

    Raises:
        InvalidRequestError: the request wants what there is not, is beyond a limit, or at odds with itself.
        NotReadyError, ParameterError, PromptError: see `Service.prepare`.
    """
    _refuse_unsupported(request)
    if isinstance(request, CompletionRequest):
        if request.best_of not in {None, request.n or 1}:
            raise InvalidRequestError("`best_of` is not supported beside `n`: every completion is returned.")
        if not isinstance(prompt["prompt"], str):
            service.check_tokens(prompt["prompt"], "prompt")
    prepared = service.prepare(
        _generation_kwargs(request),
        fill=True,
        stop=stops_of(request),
        whole_runs=False,
        show_stop_tokens=False,
        **prompt,
    ).with_config(
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        top_logprobs=(top := _top_logprobs(request)),
    )
    if top is not None and prepared.config.is_beam_search:
        raise InvalidRequestError("`logprobs` is not supported with `num_beams` above 1.")
    if isinstance(request, ChatCompletionRequest) and request.response_format is not None:
        return _formatted(service, prepared, request.response_format)
    return prepared


def asked_by(request: ChatCompletionRequest | CompletionRequest) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return a request's conversation or prompts, and for each prompt the arguments that `prepare` takes.

    Raises:
        InvalidRequestError: a message holds something else than text; there is no prompt, or they are of several kinds.
    """
    if isinstance(request, ChatCompletionRequest):
        messages = [_message(f"messages[{index}].", message) for index, message in enumerate(request.messages)]
        return messages, [{"messages": messages}]
    prompts = _prompts(request)
    return prompts, [{"prompt": prompt, "return_full_text": bool(request.echo)} for prompt in prompts]


def _message(where: str, message: ChatCompletionMessage) -> dict[str, str]:
    _refuse_unsupported(message, where)
    content = message.content
    if content is None:
        raise InvalidRequestError(f"`{where}content` must be a text or a list of text parts, but is null.")
    if isinstance(content, list):
        for index, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise InvalidRequestError(
                    f"`{where}content[{index}]` has the type {part.type[:40]!r}, which is not supported: {TEXT_ONLY}."
                )
        content = "".join(part.text or "" for part in content)
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a request for completions: one or more, each a text or token ids."""
    prompt = request.prompt
    if not prompt:
        raise InvalidRequestError("`prompt` is missing.")
    if isinstance(prompt, str):
        return [prompt]
    tokens = [item for item in prompt if isinstance(item, int)]
    if len(tokens) == len(prompt):
        return [tokens]
    prompts: list[str | list[int]] = [item for item in prompt if not isinstance(item, int)]
    if tokens or len({type(item) for item in prompts}) > 1 or not all(prompts):
        raise InvalidRequestError(
            "`prompt` must be a text, token ids, a list of texts or a list of lists of token ids."
        )
    return prompts


def stops_of(request: SamplingFields) -> list[str]:
    """Return the texts before which an answer ends; too many of them, or an empty one, are an `InvalidRequestError`."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > _MOST_STOPS or not all(stops):
        raise InvalidRequestError(f"`stop` must be a text or up to {_MOST_STOPS} texts, none of them empty.")
    return stops


@functools.cache
def _refusals(type_: type[SamplingFields | ChatCompletionMessage]) -> Mapping[str, Any]:
    """Return what the fields of a type say that are refused: the reason, and the values that ask for nothing."""
    hints = get_type_hints(type_, include_extras=True).items()
    return {name: meta.extra for name, hint in hints for meta in getattr(hint, "__metadata__", ()) if meta.extra}


def _refuse_unsupported(request: SamplingFields | ChatCompletionMessage, where: str = "") -> None:
    for name, refusal in _refusals(type(request)).items():
        value = getattr(request, name)
        if value is not None and value not in refusal["harmless"]:
            raise InvalidRequestError(f"`{where}{name}` is not supported: {refusal['reason']}.")


def _generation_kwargs(request: ChatCompletionRequest | CompletionRequest) -> dict[str, Any]:
    """Return the parameters of ``generate()`` for a request."""
    temperature = 1.0 if request.temperature is None else request.temperature
    if isinstance(request, ChatCompletionRequest):
        max_new_tokens = request.max_completion_tokens or request.max_tokens
    else:
        max_new_tokens = request.max_tokens or DEFAULT_MAX_TOKENS
    kwargs: dict[str, Any] = {
        # null decodes greedily, and allows several (equal) answers, which false does not.
        "do_sample": True if temperature > 0 else None,
        "temperature": temperature if temperature > 0 else 1.0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": 0,
        "num_return_sequences": request.n or 1,
        "max_length": None,
        "max_new_tokens": max_new_tokens,
        "sequence_bias": _biases(request) or None,
        "seed": None if request.seed in {None, -1} else request.seed % 2**64,
    }
    return kwargs | (request.generate_kwargs or {})


def _biases(request: SamplingFields) -> list[list[Any]]:
    biases: list[list[Any]] = []
    for token, bias in (request.logit_bias or {}).items():
        if not token.isascii() or not token.isdigit():
            raise InvalidRequestError(f"`logit_bias` has the key {token[:40]!r}; its keys are token ids.")
        if not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise InvalidRequestError(
                f"`logit_bias` must lie between -{_MOST_BIAS:g} and {_MOST_BIAS:g}, but is {bias:g}."
            )
        biases.append([[int(token)], float(bias)])
    return biases


def _top_logprobs(request: ChatCompletionRequest | CompletionRequest) -> int | None:
    """Return how many likeliest tokens are returned beside each chosen one, or None for no log-probabilities."""
    if isinstance(request, ChatCompletionRequest):
        if request.top_logprobs and not request.logprobs:
            raise InvalidRequestError("`top_logprobs` needs `logprobs` to be true.")
        return request.top_logprobs or 0 if request.logprobs else None
    if request.logprobs is not None and request.echo:
        raise InvalidRequestError("`logprobs` is not supported with `echo`: those of the prompt are not computed.")
    return request.logprobs


def _formatted(service: Service, prepared: PreparedPrompt, wanted: ResponseFormat) -> PreparedPrompt:
    schema = None
    if wanted.type == "text":
        return prepared
    if wanted.type == "json_schema":
        schema = wanted.json_schema.schema_ if wanted.json_schema else None
        if schema is None:
            raise InvalidRequestError(f"`{_SCHEMA}` is missing.")
    elif wanted.type != "json_object":
        raise InvalidRequestError(
            f"`response_format.type` must be text, json_object or json_schema, not {wanted.type[:40]!r}."
        )
    if prepared.config.is_beam_search:
        raise InvalidRequestError("`response_format` is not supported with `num_beams` above 1.")
    try:
        return service.pipeline.constrain(prepared, {"type": "object"} if schema is None else schema)
    except SchemaError as error:
        subject = "response_format" if schema is None else _SCHEMA
        raise InvalidRequestError(f"`{subject}` cannot be followed: {str(error).rstrip('.')}.") from None
