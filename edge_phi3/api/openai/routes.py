"""The routes under ``/v1``: chat completions, completions, responses, and what is served."""

import functools
import time
from collections.abc import Callable
from typing import Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, RawBody
from msgspec import UNSET

from edge_phi3.api.body import decode_body, sift
from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.exchange import EventStream, exchange_of
from edge_phi3.api.openai import schemas, translate
from edge_phi3.api.openai.answers import Answer, Part, Reason, Tokens, UsageField, text_of
from edge_phi3.api.openai.fields import ChatCompletionRequest, CompletionRequest
from edge_phi3.api.openai.formats import is_held
from edge_phi3.api.openai.responses import ResponseObject, ResponsesRequest, as_chat, renamed
from edge_phi3.api.openai.shown import completion_logprobs
from edge_phi3.api.service import Service
from edge_phi3.pipeline import PreparedPrompt

_STARTED = int(time.time())


class _CompletionAnswer(Answer):
    """The shapes of completions, which are the same for a whole answer and for its pieces."""

    ID_PREFIX = "cmpl"

    def choice(self, index: int, parts: list[Part], reason: Reason | None, tokens: Tokens) -> schemas.CompletionChoice:
        logprobs = None if tokens is None else completion_logprobs(self.pipeline, tokens, whole=self._scores)
        return schemas.CompletionChoice(index, text_of(parts), reason, logprobs)

    def piece(
        self, index: int, part: Part, reason: Reason | None = None, tokens: Tokens = None
    ) -> schemas.CompletionChoice:
        return self.choice(index, [part], reason, tokens)

    def chunk(self, choices: list[schemas.CompletionChoice], usage: UsageField) -> schemas.Completion:
        return schemas.Completion(*self.head, choices, "text_completion", usage)

    def opening(self, index: int) -> bytes:  # noqa: ARG002 - a choice begins with its first piece
        return b""

    body = chunk


@post("/v1/chat/completions", status_code=200, body=ChatCompletionRequest)
async def chat_completions(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[schemas.ChatCompletion] | EventStream:
    """Continue a conversation (OpenAI's API)."""
    return await _answer(Answer, request, body, service, ChatCompletionRequest)


@post("/v1/completions", status_code=200, body=CompletionRequest)
async def completions(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[schemas.Completion] | EventStream:
    """Continue prompts as they are, without a chat template (OpenAI's API)."""
    return await _answer(_CompletionAnswer, request, body, service, CompletionRequest)


@post("/v1/responses", status_code=200, body=ResponsesRequest)
async def responses(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[ResponseObject] | EventStream:
    """Continue a conversation given as items (OpenAI's API)."""
    return await _answer(Answer, request, body, service, ResponsesRequest)


async def _answer(
    shapes: Callable[..., Answer],
    request: Request[Any, Any, Any],
    body: bytes,
    service: Service,
    type_: type[ChatCompletionRequest | CompletionRequest | ResponsesRequest],
) -> Response[Any] | EventStream:
    exchange, in_lane = exchange_of(request.scope), functools.partial(service.lanes.prepare, request, body)
    decoded = await in_lane(lambda: decode_body(request, body, type_, functools.partial(sift, type_)))
    wanted: ChatCompletionRequest | CompletionRequest
    if isinstance(decoded, ResponsesRequest):
        wanted, shapes = await in_lane(functools.partial(as_chat, decoded))
    else:
        wanted = decoded

    def prepare() -> list[PreparedPrompt]:
        asked, prompts = translate.asked_by(service, wanted)
        service.note_prompt(exchange, asked)
        return [translate.prepare(service, wanted, **prompt) for prompt in prompts]

    # A schema of a kilobyte can take its compiler a second, and thousands of texts as long.
    slow = any((is_held(wanted), wanted.bad_words, wanted.logit_bias))
    try:
        prepared = await in_lane(prepare, slow=slow, foreign=service.is_foreign(getattr(wanted, "messages", None)))
    except InvalidRequestError as error:
        raise (error if wanted is decoded else renamed(error)) from None
    return await shapes(service, wanted, exchange, prepared).respond(request.receive)


@get("/v1/models", sync_to_thread=False)
def list_models(service: NamedDependency[Service]) -> schemas.ModelList:
    """List the model that is served, and its adapters (OpenAI's API)."""
    return schemas.ModelList([_model(service, name) for name in service.pipeline.names])


@get("/v1/models/{name:path}", sync_to_thread=False)
def show_model(name: FromPath[str], service: NamedDependency[Service]) -> schemas.Model:
    """Describe the model, or an adapter, by its name (OpenAI's API)."""
    name = name.removeprefix("/")
    service.place_of(name)
    return _model(service, name)


def _model(service: Service, name: str) -> schemas.Model:
    pipeline, own = service.pipeline, service.pipeline.model.name
    return schemas.Model(name, _STARTED, pipeline.engine.max_length, parent=UNSET if name == own else own)


HANDLERS = [chat_completions, completions, responses, list_models, show_model]
