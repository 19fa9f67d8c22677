"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import RawBody

from edge_phi3.api.body import decode_body, work_on
from edge_phi3.api.exchange import Exchange, exchange_of
from edge_phi3.api.openai import translate
from edge_phi3.api.openai.answers import Answer, Reason, Tokens
from edge_phi3.api.openai.logprobs import chat_logprobs
from edge_phi3.api.openai.options import with_options
from edge_phi3.api.openai.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatLogprobs,
    ChunkChoice,
    CompletionUsage,
    Delta,
)
from edge_phi3.api.service import Service
from edge_phi3.pipeline import PreparedPrompt


@post("/v1/chat/completions", status_code=200)
async def chat_completions(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[Any]:
    """Continue a conversation."""
    wanted = decode_body(request, body, ChatCompletionRequest)
    exchange = exchange_of(request.scope)
    prepared = await work_on(body, lambda: _prepare(service, wanted, exchange))
    return await _ChatAnswer(service, wanted, exchange, [prepared]).respond(request.receive)


def _prepare(service: Service, wanted: ChatCompletionRequest, exchange: Exchange) -> PreparedPrompt:
    translate.refuse_unsupported(wanted)
    messages = translate.messages_of(wanted)
    if service.settings.log_prompts:
        exchange.prompt = msgspec.json.encode(messages).decode()
    prepared = service.prepare_within(
        lambda new_tokens: {
            "prompt": None,
            "messages": messages,
            "generate_kwargs": translate.generation_kwargs(wanted, new_tokens),
        },
        translate.most_tokens(wanted),
    )
    return with_options(service, prepared, wanted)


class _ChatAnswer(Answer):
    """The shapes of chat completions."""

    ID_PREFIX = "chatcmpl"

    def choice(self, index: int, text: str, reason: Reason, tokens: Tokens) -> ChatChoice:
        return ChatChoice(index, AnswerMessage(text), reason, self._logprobs(tokens))

    def opening(self, index: int) -> ChunkChoice:
        return ChunkChoice(index, Delta(role="assistant", content=""))

    def piece(self, index: int, text: str, reason: Reason | None = None, tokens: Tokens = None) -> ChunkChoice:
        return ChunkChoice(index, Delta(content=text or msgspec.UNSET), reason, self._logprobs(tokens))

    def body(self, choices: list[ChatChoice], usage: CompletionUsage) -> ChatCompletion:
        return ChatCompletion(*self.head, choices, usage)

    def chunk(
        self, choices: list[ChunkChoice], usage: CompletionUsage | msgspec.UnsetType | None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(*self.head, choices, "chat.completion.chunk", usage)

    def _logprobs(self, tokens: Tokens) -> ChatLogprobs | None:
        return None if tokens is None else chat_logprobs(self.pipeline, tokens)
