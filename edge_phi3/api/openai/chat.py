"""``POST /v1/chat/completions``."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import RawBody

from edge_phi3.api.body import decode_body
from edge_phi3.api.disconnect import cancelled_when_client_leaves
from edge_phi3.api.exchange import Exchange, exchange_of
from edge_phi3.api.long_texts import work_on
from edge_phi3.api.openai import translate
from edge_phi3.api.openai.answers import finish_reason_of, usage_of
from edge_phi3.api.openai.errors import error_body
from edge_phi3.api.openai.logprobs import ShownTokens, chat_logprobs, shown_tokens
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
from edge_phi3.api.openai.stops import StopTrimmer, trim
from edge_phi3.api.service import Service
from edge_phi3.api.sse import EventStream, event
from edge_phi3.engine.token_offsets import PlacedLogprobs
from edge_phi3.pipeline import GenerationOutput, PreparedPrompt, TextDelta, TokenDelta

_encode = msgspec.json.Encoder().encode


@post("/v1/chat/completions", status_code=200)
async def chat_completions(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[Any]:
    """Continue a conversation."""
    asked = decode_body(request, body, ChatCompletionRequest)
    exchange = exchange_of(request.scope)
    prepared = await work_on(body, lambda: _prepare(service, asked, exchange))
    answer = _Answer(service, asked, exchange)
    if asked.stream:
        return EventStream(answer.events(prepared), _failure)
    async with cancelled_when_client_leaves(request.receive):
        exchange.output = output = await service.generate(prepared, exchange.request_id)
    return Response(answer.whole(output))


def _prepare(service: Service, asked: ChatCompletionRequest, exchange: Exchange) -> PreparedPrompt:
    translate.refuse_unsupported(asked)
    messages = translate.messages_of(asked)
    if service.settings.log_prompts:
        exchange.prompt = _encode(messages).decode()
    prepared = service.prepare_within(
        lambda new_tokens: {
            "prompt": None,
            "messages": messages,
            "generate_kwargs": translate.generation_kwargs(asked, new_tokens),
        },
        translate.most_tokens(asked),
    )
    return with_options(service, prepared, asked)


class _Answer:
    """The ways in which one request is answered."""

    def __init__(self, service: Service, asked: ChatCompletionRequest, exchange: Exchange) -> None:
        self._service = service
        self._exchange = exchange
        self._stops = translate.stops_of(asked)
        self._logprobs = bool(asked.logprobs)
        self._usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        # Asked for once: a service that is stopping still finishes its answers.
        self._pipeline = service.pipeline
        self._model = self._pipeline.model.name

    def whole(self, output: GenerationOutput) -> ChatCompletion:
        """Make the answer in one body."""
        choices = []
        for index, (text, reason) in enumerate(zip(output.texts, output.finish_reasons, strict=True)):
            shown, stopped = trim(text, self._stops)
            told = None if output.logprobs is None else self._told(shown_tokens(output.logprobs[index], shown))
            choices.append(ChatChoice(index, AnswerMessage(shown), finish_reason_of(reason, stopped=stopped), told))
        return ChatCompletion(self._id, self._created, self._model, choices, usage_of(output))

    async def events(self, prepared: PreparedPrompt) -> AsyncGenerator[bytes, None]:
        """Give the answer in chunks: roles, pieces of text, what ended each choice, and the usage if asked for."""
        count = prepared.config.num_return_sequences
        trimmers = [StopTrimmer(self._stops) for _ in range(count)]
        tokens = [ShownTokens() for _ in range(count)]

        def encoded(item: TextDelta | GenerationOutput) -> Iterator[bytes]:
            if isinstance(item, TextDelta):
                if isinstance(item, TokenDelta):
                    tokens[item.index].push(item.placed)
                if text := trimmers[item.index].push(item.text):
                    yield self._piece(item.index, text, tokens[item.index])
                return
            self._exchange.output = item
            for index, (trimmer, reason) in enumerate(zip(trimmers, item.finish_reasons, strict=True)):
                whole = item.texts[index] if prepared.config.is_beam_search else ""
                if text := trimmer.push(whole) + trimmer.finish():
                    yield self._piece(index, text, tokens[index])
                yield self._chunk(ChunkChoice(index, Delta(), finish_reason_of(reason, stopped=trimmer.stopped)))
            if self._usage:
                yield self._chunk(usage=usage_of(item))

        roles = [self._chunk(ChunkChoice(index, Delta(role="assistant", content=""))) for index in range(count)]
        async with self._service.stream(prepared, self._exchange.request_id) as steps:
            async for items in steps:
                yield b"".join([*roles, *itertools.chain.from_iterable(map(encoded, items))])
                roles = []
        yield event(b"[DONE]")

    def _piece(self, index: int, text: str, tokens: ShownTokens) -> bytes:
        told = self._told(tokens.show(text)) if self._logprobs else None
        return self._chunk(ChunkChoice(index, Delta(content=text), logprobs=told))

    def _told(self, tokens: list[PlacedLogprobs]) -> ChatLogprobs:
        return chat_logprobs(self._pipeline, tokens)

    def _chunk(self, *choices: ChunkChoice, usage: CompletionUsage | None = None) -> bytes:
        shown = usage if self._usage else msgspec.UNSET
        chunk = ChatCompletionChunk(self._id, self._created, self._model, list(choices), "chat.completion.chunk", shown)
        return event(_encode(chunk))


def _failure(error: Exception) -> bytes:
    return event(_encode(error_body(error)))
