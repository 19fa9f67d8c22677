"""``POST /v1/completions``: prompts continued as they are, without a chat template."""

from __future__ import annotations

import asyncio
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
from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.exchange import Exchange, exchange_of
from edge_phi3.api.long_texts import work_on
from edge_phi3.api.openai import translate
from edge_phi3.api.openai.answers import finish_reason_of, usage_of
from edge_phi3.api.openai.errors import error_body
from edge_phi3.api.openai.logprobs import ShownTokens, completion_logprobs, shown_tokens
from edge_phi3.api.openai.options import with_options
from edge_phi3.api.openai.schemas import Completion, CompletionChoice, CompletionRequest, CompletionUsage
from edge_phi3.api.openai.stops import StopTrimmer, trim
from edge_phi3.api.service import Service
from edge_phi3.api.sse import EventStream, event
from edge_phi3.pipeline import GenerationOutput, PreparedPrompt, TextDelta, TokenDelta

DEFAULT_MAX_TOKENS = 16
"""Tokens of a completion when the request does not say: OpenAI's default."""

_encode = msgspec.json.Encoder().encode


@post("/v1/completions", status_code=200)
async def completions(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[Any]:
    """Continue one or more prompts."""
    asked = decode_body(request, body, CompletionRequest)
    exchange = exchange_of(request.scope)
    prompts = translate.prompts_of(asked)
    if service.settings.log_prompts:
        exchange.prompt = _encode(prompts).decode()
    prepared = await work_on(body, lambda: [_prepare(service, asked, prompt) for prompt in prompts])
    answer = _Answer(service, asked, exchange, prepared)
    if asked.stream:
        return EventStream(answer.events(), _failure)
    async with cancelled_when_client_leaves(request.receive):
        return Response(await answer.whole())


def _prepare(service: Service, asked: CompletionRequest, prompt: str | list[int]) -> PreparedPrompt:
    translate.refuse_unsupported(asked)
    if asked.best_of not in {None, asked.n or 1}:
        raise InvalidRequestError("`best_of` is not supported beside `n`: every completion is returned.")
    new_tokens = translate.most_tokens(asked) or DEFAULT_MAX_TOKENS
    text = prompt if isinstance(prompt, str) else service.text_of(prompt)
    prepared = service.prepare_within(
        lambda most: {
            "prompt": text,
            "messages": None,
            "generate_kwargs": translate.generation_kwargs(asked, most),
            "return_full_text": bool(asked.echo),
        },
        new_tokens,
    )
    prepared = with_options(service, prepared, asked)
    return prepared if isinstance(prompt, str) else service.with_tokens(prepared, prompt)


class _Answer:
    """The ways in which one request is answered."""

    def __init__(
        self, service: Service, asked: CompletionRequest, exchange: Exchange, prepared: list[PreparedPrompt]
    ) -> None:
        self._service = service
        self._exchange = exchange
        self._prepared = prepared
        self._stops = translate.stops_of(asked)
        self._logprobs = asked.logprobs is not None
        self._usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        # Asked for once: a service that is stopping still finishes its answers.
        self._pipeline = service.pipeline
        self._model = self._pipeline.model.name

    async def whole(self) -> Completion:
        """Run all prompts at once, and make the answer in one body."""
        tasks = [asyncio.create_task(self._generate(prepared)) for prepared in self._prepared]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            _cancel(tasks)
        self._exchange.output = outputs[0]
        choices: list[CompletionChoice] = []
        for prepared, output in zip(self._prepared, outputs, strict=True):
            for index, (text, reason) in enumerate(zip(output.texts, output.finish_reasons, strict=True)):
                shown, stopped = trim(text[len(prepared.lead) :], self._stops)
                reason_shown = finish_reason_of(reason, stopped=stopped)
                told = None
                if output.logprobs is not None:
                    told = completion_logprobs(self._pipeline, shown_tokens(output.logprobs[index], shown))
                choices.append(CompletionChoice(len(choices), prepared.lead + shown, reason_shown, told))
        return self._completion(choices, usage_of(*outputs))

    async def _generate(self, prepared: PreparedPrompt) -> GenerationOutput:
        return await self._service.generate(prepared, self._exchange.request_id)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Give the answer in chunks, those of several prompts as they come."""
        mailbox: asyncio.Queue[bytes | asyncio.Task[GenerationOutput]] = asyncio.Queue()
        tasks: list[asyncio.Task[GenerationOutput]] = []
        first = 0
        for prepared in self._prepared:
            task = asyncio.create_task(self._stream(prepared, first, mailbox))
            task.add_done_callback(mailbox.put_nowait)
            tasks.append(task)
            first += prepared.config.num_return_sequences
        outputs: list[GenerationOutput] = []
        try:
            while len(outputs) < len(tasks):
                item = await mailbox.get()
                if isinstance(item, bytes):
                    yield item
                else:
                    outputs.append(item.result())
        finally:
            _cancel(tasks)
        self._exchange.output = outputs[0]
        if self._usage:
            yield event(_encode(self._completion([], usage_of(*outputs))))
        yield event(b"[DONE]")

    async def _stream(
        self, prepared: PreparedPrompt, first: int, mailbox: asyncio.Queue[bytes | asyncio.Task[GenerationOutput]]
    ) -> GenerationOutput:
        """Put the chunks of one prompt into the mailbox; `first` is the index of its first choice."""
        trimmers = [StopTrimmer(self._stops) for _ in range(prepared.config.num_return_sequences)]
        tokens = [ShownTokens() for _ in trimmers]

        def encoded(index: int, text: str) -> Iterator[bytes]:
            if text:
                shown = tokens[index].show(text)
                told = completion_logprobs(self._pipeline, shown) if self._logprobs else None
                yield self._chunk(CompletionChoice(first + index, text, None, told))

        def last(output: GenerationOutput) -> Iterator[bytes]:
            for index, (trimmer, reason) in enumerate(zip(trimmers, output.finish_reasons, strict=True)):
                if prepared.config.is_beam_search:
                    yield from encoded(index, trimmer.push(output.texts[index][len(prepared.lead) :]))
                yield from encoded(index, trimmer.finish())
                reason_shown = finish_reason_of(reason, stopped=trimmer.stopped)
                yield self._chunk(CompletionChoice(first + index, "", reason_shown))

        pieces = [piece for index in range(len(trimmers)) for piece in encoded(index, prepared.lead)]
        async with self._service.stream(prepared, self._exchange.request_id) as steps:
            async for items in steps:
                for item in items:
                    if isinstance(item, TokenDelta):
                        tokens[item.index].push(item.placed)
                    if isinstance(item, TextDelta):
                        pieces += encoded(item.index, trimmers[item.index].push(item.text))
                    else:
                        pieces += last(item)
                if pieces:
                    mailbox.put_nowait(b"".join(pieces))
                    pieces.clear()
                if isinstance(items[-1], GenerationOutput):
                    return items[-1]
        raise AssertionError("the pipeline ends every stream with the whole answer")

    def _chunk(self, choice: CompletionChoice) -> bytes:
        return event(_encode(self._completion([choice], None if self._usage else msgspec.UNSET)))

    def _completion(
        self, choices: list[CompletionChoice], usage: CompletionUsage | msgspec.UnsetType | None
    ) -> Completion:
        return Completion(self._id, self._created, self._model, choices, "text_completion", usage)


def _failure(error: Exception) -> bytes:
    return event(_encode(error_body(error)))


def _cancel(tasks: list[asyncio.Task[GenerationOutput]]) -> None:
    for task in tasks:
        task.cancel()
