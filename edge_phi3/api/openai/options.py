"""OpenAI's options that ``generate()`` has not: penalties, log-probabilities and the format of an answer."""

from __future__ import annotations

import dataclasses

from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.openai.schemas import ChatCompletionRequest, CompletionRequest, ResponseFormat
from edge_phi3.api.service import Service
from edge_phi3.engine.json_schema import json_grammar
from edge_phi3.llama import GrammarError
from edge_phi3.pipeline import PreparedPrompt

_SCHEMA = "response_format.json_schema.schema"


def with_options(
    service: Service, prepared: PreparedPrompt, request: ChatCompletionRequest | CompletionRequest
) -> PreparedPrompt:
    """Add what a request sets beside the parameters of ``generate()``.

    Raises:
        InvalidRequestError: an option is wrong, or at odds with another.
    """
    top = _top_logprobs(request)
    if top is not None and prepared.config.is_beam_search:
        raise InvalidRequestError("`logprobs` is not supported with `num_beams` above 1.")
    if request.presence_penalty or request.frequency_penalty or top is not None:
        config = dataclasses.replace(
            prepared.config,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            top_logprobs=top,
        )
        prepared = dataclasses.replace(prepared, config=config)
    if isinstance(request, ChatCompletionRequest) and request.response_format is not None:
        return _formatted(service, prepared, request.response_format)
    return prepared


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
    schema: object = None
    match wanted.type:
        case "text":
            return prepared
        case "json_object":
            pass
        case "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema_ is None:
                raise InvalidRequestError(f"`{_SCHEMA}` is missing.")
            schema = wanted.json_schema.schema_
        case _:
            raise InvalidRequestError(
                f"`response_format.type` must be text, json_object or json_schema, not {wanted.type[:40]!r}."
            )
    if prepared.config.is_beam_search:
        raise InvalidRequestError("`response_format` is not supported with `num_beams` above 1.")
    try:
        return service.pipeline.constrain(prepared, json_grammar(schema))
    except GrammarError as error:
        subject = "response_format" if schema is None else _SCHEMA
        raise InvalidRequestError(f"`{subject}` cannot be followed: {str(error).rstrip('.')}.") from None
