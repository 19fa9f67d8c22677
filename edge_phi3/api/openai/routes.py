"""The routes under ``/v1``: chat completions, completions, and the one model that is served."""

from __future__ import annotations

import functools
import time
from typing import Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, RawBody
from msgspec import UNSET

from edge_phi3.api.body import decode_body, work_on
from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.exchange import exchange_of
from edge_phi3.api.openai import schemas, translate
from edge_phi3.api.openai.answers import Answer, Reason, Tokens, UsageField
from edge_phi3.api.openai.fields import ChatCompletionRequest, CompletionRequest
from edge_phi3.api.openai.reading import sift
from edge_phi3.api.openai.shown import chat_logprobs, completion_logprobs
from edge_phi3.api.service import Service
from edge_phi3.api.sse import EventStream
from edge_phi3.pipeline import PreparedPrompt

_STARTED = int(time.time())


class _ChatAnswer(Answer):
    """The shapes of chat completions."""

    ID_PREFIX = "chatcmpl"

    def choice(self, index: int, text: str, reason: Reason, tokens: Tokens) -> schemas.ChatChoice:
        return schemas.ChatChoice(index, schemas.AnswerMessage(text), reason, self._logprobs(tokens))

    def opening(self, index: int) -> schemas.ChunkChoice:
        return schemas.ChunkChoice(index, schemas.Delta(role="assistant", content=""))

    def piece(self, index: int, text: str, reason: Reason | None = None, tokens: Tokens = None) -> schemas.ChunkChoice:
        return schemas.ChunkChoice(index, schemas.Delta(content=text or UNSET), reason, self._logprobs(tokens))

    def body(self, choices: list[schemas.ChatChoice], usage: schemas.CompletionUsage) -> schemas.ChatCompletion:
        return schemas.ChatCompletion(*self.head, choices, usage)

    def chunk(self, choices: list[schemas.ChunkChoice], usage: UsageField) -> schemas.ChatCompletionChunk:
        return schemas.ChatCompletionChunk(*self.head, choices, "chat.completion.chunk", usage)

    def _logprobs(self, tokens: Tokens) -> schemas.ChatLogprobs | None:
        return None if tokens is None else chat_logprobs(self.pipeline, tokens)


class _CompletionAnswer(Answer):
    """The shapes of completions, which are the same for a whole answer and for its pieces."""

    ID_PREFIX = "cmpl"

    def choice(
        self, index: int, text: str, reason: Reason | None = None, tokens: Tokens = None
    ) -> schemas.CompletionChoice:
        logprobs = None if tokens is None else completion_logprobs(self.pipeline, tokens, whole=self._scores)
        return schemas.CompletionChoice(index, text, reason, logprobs)

    def chunk(self, choices: list[schemas.CompletionChoice], usage: UsageField) -> schemas.Completion:
        return schemas.Completion(*self.head, choices, "text_completion", usage)

    piece = choice
    body = chunk


@post("/v1/chat/completions", status_code=200, body=ChatCompletionRequest)
async def chat_completions(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[schemas.ChatCompletion] | EventStream:
    """Continue a conversation (OpenAI's API)."""
    return await _answer(_ChatAnswer, request, body, service, ChatCompletionRequest)


@post("/v1/completions", status_code=200, body=CompletionRequest)
async def completions(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[schemas.Completion] | EventStream:
    """Continue prompts as they are, without a chat template (OpenAI's API)."""
    return await _answer(_CompletionAnswer, request, body, service, CompletionRequest)


async def _answer(
    shapes: type[Answer],
    request: Request[Any, Any, Any],
    body: bytes,
    service: Service,
    type_: type[ChatCompletionRequest | CompletionRequest],
) -> Response[Any] | EventStream:
    wanted = decode_body(request, body, type_, functools.partial(sift, type_))
    exchange = exchange_of(request.scope)

    def prepare() -> list[PreparedPrompt]:
        asked, prompts = translate.asked_by(wanted)
        service.note_prompt(exchange, asked)
        if len(prompts) > (most := service.settings.max_queue):
            raise InvalidRequestError(f"`prompt` holds {len(prompts)} prompts; at most {most} can wait (--max-queue).")
        return [translate.prepare(service, wanted, **prompt) for prompt in prompts]

    # A schema of a kilobyte can take its compiler a second.
    prepared = await work_on(body, prepare, slow=wanted.response_format is not None)
    return await shapes(service, wanted, exchange, prepared).respond(request.receive)


@get("/v1/models", sync_to_thread=False)
def list_models(service: NamedDependency[Service]) -> schemas.ModelList:
    """List the models that are served: one (OpenAI's API)."""
    return schemas.ModelList([_model(service)])


@get("/v1/models/{name:path}", sync_to_thread=False)
def show_model(name: FromPath[str], service: NamedDependency[Service]) -> schemas.Model:
    """Describe the model by its name (OpenAI's API)."""
    known = service.pipeline.model.name
    if name.removeprefix("/") != known:
        raise NotFoundException(f"The model {name[1:61]!r} is not served here; {known!r} is.")
    return _model(service)


def _model(service: Service) -> schemas.Model:
    pipeline = service.pipeline
    return schemas.Model(pipeline.model.name, _STARTED, pipeline.engine.max_length)


HANDLERS = [chat_completions, completions, list_models, show_model]
"""The routes."""
