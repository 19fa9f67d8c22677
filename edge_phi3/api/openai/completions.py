"""``POST /v1/completions``: prompts continued as they are, without a chat template."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import RawBody

from edge_phi3.api.body import decode_body, work_on
from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.exchange import exchange_of
from edge_phi3.api.openai import translate
from edge_phi3.api.openai.answers import Answer, Reason, Tokens
from edge_phi3.api.openai.logprobs import completion_logprobs
from edge_phi3.api.openai.options import with_options
from edge_phi3.api.openai.schemas import Completion, CompletionChoice, CompletionRequest, CompletionUsage
from edge_phi3.api.service import Service
from edge_phi3.pipeline import PreparedPrompt

DEFAULT_MAX_TOKENS = 16
"""Tokens of a completion when the request does not say: OpenAI's default."""


@post("/v1/completions", status_code=200)
async def completions(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[Any]:
    """Continue one or more prompts."""
    wanted = decode_body(request, body, CompletionRequest)
    exchange = exchange_of(request.scope)
    prompts = translate.prompts_of(wanted)
    if service.settings.log_prompts:
        exchange.prompt = msgspec.json.encode(prompts).decode()
    prepared = await work_on(body, lambda: [_prepare(service, wanted, prompt) for prompt in prompts])
    return await _CompletionAnswer(service, wanted, exchange, prepared).respond(request.receive)


def _prepare(service: Service, wanted: CompletionRequest, prompt: str | list[int]) -> PreparedPrompt:
    translate.refuse_unsupported(wanted)
    if wanted.best_of not in {None, wanted.n or 1}:
        raise InvalidRequestError("`best_of` is not supported beside `n`: every completion is returned.")
    text = prompt if isinstance(prompt, str) else service.text_of(prompt, "prompt") or " "
    prepared = service.prepare_within(
        lambda new_tokens: {
            "prompt": text,
            "messages": None,
            "generate_kwargs": translate.generation_kwargs(wanted, new_tokens),
            "return_full_text": bool(wanted.echo),
        },
        translate.most_tokens(wanted) or DEFAULT_MAX_TOKENS,
    )
    prepared = with_options(service, prepared, wanted)
    return prepared if isinstance(prompt, str) else service.with_tokens(prepared, prompt)


class _CompletionAnswer(Answer):
    """The shapes of completions."""

    ID_PREFIX = "cmpl"

    def choice(self, index: int, text: str, reason: Reason | None = None, tokens: Tokens = None) -> CompletionChoice:
        logprobs = None if tokens is None else completion_logprobs(self.pipeline, tokens)
        return CompletionChoice(index, text, reason, logprobs)

    piece = choice

    def body(self, choices: list[CompletionChoice], usage: CompletionUsage) -> Completion:
        return self.chunk(choices, usage)

    def chunk(self, choices: list[CompletionChoice], usage: CompletionUsage | msgspec.UnsetType | None) -> Completion:
        return Completion(*self.head, choices, "text_completion", usage)
