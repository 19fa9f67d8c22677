"""How requests to OpenAI's API are answered: in one body, or in chunks, in the shapes of chat completions."""

import asyncio
import contextlib
import functools
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, ClassVar, Literal

from litestar import Response
from litestar.types import Receive
from msgspec import UNSET, Struct, UnsetType

from edge_phi3.api.exchange import EventStream, Exchange, cancelled_when_client_leaves, event
from edge_phi3.api.openai import translate
from edge_phi3.api.openai.fields import ChatCompletionRequest, CompletionRequest
from edge_phi3.api.openai.schemas import (
    AnswerMessage,
    CallDelta,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChunkChoice,
    CompletionTokensDetails,
    CompletionUsage,
    Delta,
    FunctionCall,
    FunctionDelta,
    PromptTokensDetails,
    ToolCall,
)
from edge_phi3.api.openai.shown import ShownText, chat_logprobs
from edge_phi3.api.openai.tools import use_of
from edge_phi3.api.service import Service
from edge_phi3.engine.token_offsets import PlacedLogprobs
from edge_phi3.pipeline import GenerationOutput, PreparedPrompt, TextDelta
from edge_phi3.pipeline.tool_calls import CallPart, CallReader

Reason = Literal["stop", "length", "tool_calls"]
Part = str | CallPart
"""A piece of an answer: of its text, or of a call."""
Tokens = list[PlacedLogprobs] | None
UsageField = CompletionUsage | UnsetType | None


class Answer:
    """The answer to one request, whose prompts are run at once. A subclass gives the shapes of another API.

    `ID_PREFIX` is what the answer's id begins with.
    """

    ID_PREFIX: ClassVar[str] = "chatcmpl"

    def __init__(
        self,
        service: Service,
        request: ChatCompletionRequest | CompletionRequest,
        exchange: Exchange,
        prepared: Sequence[PreparedPrompt],
    ) -> None:
        self._service = service
        self._exchange = exchange
        self._prepared = prepared
        self._streamed = bool(request.stream)
        self._shown = functools.partial(
            ShownText, translate.stops_of(request), include=bool(request.include_stop_str_in_output)
        )
        options = request.stream_options
        self._usage = bool(options and options.include_usage)
        self._usage_so_far = self._usage and bool(options and options.continuous_usage_stats)
        self._arrived = self._generated = 0
        self._kept = request.n or 1 if translate.candidates_of(request) else None
        self._calls = use_of(request) is not None
        self._tells_tokens = request.logprobs is not None and request.logprobs is not False
        self._scores = translate.scores_prompts(request)
        self._outputs: list[GenerationOutput] = []
        # Taken once: a service that is stopping still finishes its answers.
        self.pipeline = service.pipeline
        self.head = (f"{self.ID_PREFIX}-{uuid.uuid4().hex}", int(time.time()), self.pipeline.names[prepared[0].adapter])

    def choice(self, index: int, parts: list[Part], reason: Reason, tokens: Tokens) -> Any:
        """Return a whole choice; `tokens` are those of its text, or None when log-probabilities are not wanted."""
        text, calls = text_of(parts), _calls_of(parts)
        message = AnswerMessage(text if text or not calls else None, tool_calls=calls or UNSET)
        return ChatChoice(index, message, reason, self._logprobs(tokens))

    def body(self, choices: list[Any], usage: CompletionUsage) -> Struct:
        """Return the answer in one body."""
        return ChatCompletion(*self.head, choices, usage)

    def piece(self, index: int, part: Part, reason: Reason | None = None, tokens: Tokens = None) -> Struct:
        """Return a piece of a choice; the last one has the finish reason, and no text."""
        if isinstance(part, str):
            delta = Delta(content=part or UNSET)
        elif part.arguments:
            delta = Delta(tool_calls=[CallDelta(part.index, FunctionDelta(part.arguments))])
        else:
            delta = Delta(tool_calls=[CallDelta(part.index, FunctionDelta("", part.name), part.id, "function")])
        return ChunkChoice(index, delta, reason, self._logprobs(tokens))

    def chunk(self, choices: list[Any], usage: UsageField) -> Struct:
        """Return a chunk of the stream."""
        return ChatCompletionChunk(*self.head, choices, "chat.completion.chunk", usage)

    def opening(self, index: int) -> bytes:
        """Return the events that a choice begins with in a stream, if any."""
        return self._event(ChunkChoice(index, Delta(role="assistant", content="")))

    def told(self, index: int, part: Part, tokens: Tokens) -> bytes:
        """Return the events of a piece of a choice."""
        return self._event(self.piece(index, part, None, tokens))

    def ended(self, index: int, reason: Reason, usage: CompletionUsage, tokens: Tokens) -> bytes:  # noqa: ARG002 - the last chunk has all
        """Return the events of a choice's end, and `tokens` that no piece had; `usage` is that of its prompt."""
        return self._event(self.piece(index, "", reason, tokens or None))

    def closing(self) -> bytes:
        """Return what the stream ends with: the token counts, where they are wanted."""
        usage = event(self.chunk([], _usage_of(self._outputs))) if self._usage else b""
        return usage + event(b"[DONE]")

    def _event(self, piece: Struct) -> bytes:
        usage: UsageField = None if self._usage else UNSET
        if self._usage_so_far:
            prompt = sum(len(prepared.prompt_ids) for prepared in self._prepared)
            usage = CompletionUsage(prompt, self._generated, prompt + self._generated)
        return event(self.chunk([piece], usage))

    def _logprobs(self, tokens: Tokens) -> Any:
        return None if tokens is None else chat_logprobs(self.pipeline, tokens)

    async def respond(self, receive: Receive) -> EventStream | Response[Any]:
        """Return the response; the client that `receive` listens to may leave before."""
        if self._streamed:
            return EventStream(self._events())
        async with cancelled_when_client_leaves(receive):
            return Response(await self._whole())

    async def _whole(self) -> Struct:
        request_id = self._exchange.request_id
        tasks = [asyncio.create_task(self._service.generate(prepared, request_id)) for prepared in self._prepared]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            _cancel(tasks)
        self._exchange.output = outputs[0]
        choices: list[Any] = []
        for prepared, output in zip(self._prepared, outputs, strict=True):
            for index in _best(output, self._kept):
                shown = self._shown()
                text = prepared.lead + shown.push(output.texts[index][len(prepared.lead) :], last=True)
                tokens = None
                if output.logprobs is not None and self._tells_tokens:
                    shown.push_tokens(output.logprobs[index])
                    tokens = shown.tokens()
                    if output.prompt_logprobs is not None:
                        # Those without a text count too: whoever counts tokens finds as many as were computed.
                        answer = tokens if shown.stopped else output.logprobs[index]
                        moved = [PlacedLogprobs(len(prepared.lead) + start, token) for start, token in answer]
                        tokens = [*output.prompt_logprobs, *moved]
                reader = CallReader()
                parts = self._parts(reader, text, last=True)
                reason = _finish_reason(output.finish_reasons[index], shown, reader)
                choices.append(self.choice(len(choices), parts, reason, tokens))
        return self.body(choices, _usage_of(outputs))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer in chunks, those of several prompts as they come."""
        streams, first = [], 0
        for prepared in self._prepared:
            streams.append(self._stream(prepared, first))
            first += prepared.config.num_return_sequences
        async with contextlib.aclosing(streams[0] if len(streams) == 1 else _merged(streams)) as chunks:
            async for chunk in chunks:
                yield chunk
        yield self.closing()

    async def _stream(self, prepared: PreparedPrompt, first: int) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of one prompt; `first` is the index of its first choice."""
        count = prepared.config.num_return_sequences
        choices = [(self._shown(), CallReader()) for _ in range(count)]

        def events_of(item: TextDelta | GenerationOutput) -> Iterator[bytes]:
            if isinstance(item, TextDelta):
                choices[item.index][0].push_tokens(item.placed)
                yield from told(item.index, item.text)
                return
            self._outputs.append(item)
            if len(self._outputs) == len(self._prepared):
                self._exchange.output = self._outputs[0]
            for index, (choice, reason) in enumerate(zip(choices, item.finish_reasons, strict=True)):
                whole = item.texts[index][len(prepared.lead) :] if prepared.config.is_beam_search else ""
                yield from told(index, whole, last=True)
                yield self.ended(first + index, _finish_reason(reason, *choice), _usage_of([item]), tokens_of(index))

        def told(index: int, text: str, *, last: bool = False) -> Iterator[bytes]:
            shown, reader = choices[index]
            for part in self._parts(reader, shown.push(text, last=last), last=last):
                yield self.told(first + index, part, tokens_of(index))

        def tokens_of(index: int) -> Tokens:
            return None if prepared.config.top_logprobs is None else choices[index][0].tokens()

        waiting = b""
        for index in range(first, first + count):
            waiting += self.opening(index)
            waiting += self.told(index, prepared.lead, None) if prepared.lead else b""
        async with self._service.stream(prepared, self._exchange.request_id, generated=self._count) as steps:
            async for items in steps:
                events = waiting + b"".join(itertools.chain.from_iterable(map(events_of, items[:-1])))
                self._generated = self._arrived  # what came together is told together, with the last of it
                events, waiting = events + b"".join(itertools.chain.from_iterable(map(events_of, items[-1:]))), b""
                if events:
                    yield events

    def _parts(self, reader: CallReader, text: str, *, last: bool) -> list[Part]:
        """Return the pieces of a text; `reader` has taken what was before."""
        if self._calls:
            return [*reader.push(text, last=last)]
        return [text] if text else []

    def _count(self, tokens: int) -> None:
        self._arrived += tokens


def text_of(parts: Sequence[Part]) -> str:
    """Return the text of an answer."""
    return "".join(part for part in parts if isinstance(part, str))


def _calls_of(parts: Sequence[Part]) -> list[ToolCall]:
    """Return the calls of an answer; the last may be incomplete."""
    calls: dict[int, ToolCall] = {}
    for part in parts:
        if isinstance(part, CallPart):
            call = calls.setdefault(part.index, ToolCall(id=part.id, function=FunctionCall(part.name, "")))
            call.function.arguments += part.arguments
    return list(calls.values())


def _finish_reason(reason: str, shown: ShownText, reader: CallReader) -> Reason:
    """Return OpenAI's word for the engine's reason, where no stop text ended what is shown before."""
    if not shown.stopped and reason not in {"stop", "stop_string"}:
        return "length"
    return "tool_calls" if reader.whole else "stop"


def _best(output: GenerationOutput, count: int | None) -> Sequence[int]:
    """Return the places of the answers, or of so many whose log-probability per token is highest, best first."""
    places = range(len(output.texts))
    if count is None:
        return places

    def score(place: int) -> float:
        tokens = (output.logprobs or [])[place]
        return sum(token.logprobs.logprob for token in tokens) / max(1, len(tokens))

    return sorted(places, key=score, reverse=True)[:count]


def _usage_of(outputs: Sequence[GenerationOutput]) -> CompletionUsage:
    prompt = sum(output.prompt_tokens for output in outputs)
    completion = sum(output.completion_tokens for output in outputs)
    cached = sum(output.cached_tokens for output in outputs)
    accepted = sum(output.accepted_tokens for output in outputs)
    rejected = sum(output.drafted_tokens for output in outputs) - accepted
    details = PromptTokensDetails(cached), CompletionTokensDetails(accepted, rejected)
    return CompletionUsage(prompt, completion, prompt + completion, *details)


async def _merged(streams: Sequence[AsyncGenerator[bytes, None]]) -> AsyncGenerator[bytes, None]:
    """Yield what several streams yield, as it comes."""
    mailbox: asyncio.Queue[bytes | asyncio.Task[None]] = asyncio.Queue()

    async def forward(stream: AsyncGenerator[bytes, None]) -> None:
        async with contextlib.aclosing(stream):
            async for chunk in stream:
                mailbox.put_nowait(chunk)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(mailbox.put_nowait)
    running = len(tasks)
    try:
        while running:
            item = await mailbox.get()
            if isinstance(item, bytes):
                yield item
            else:
                item.result()
                running -= 1
    finally:
        _cancel(tasks)


def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
