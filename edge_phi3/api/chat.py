"""``POST /chat``: the original service's endpoint, plain or streamed."""

import contextlib
import functools
import types
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Annotated, Any, Final, Union, get_args, get_origin

import pydantic
from litestar import Request, Response, post
from litestar.di import NamedDependency
from litestar.params import RawBody

from edge_phi3.api.body import decode_body
from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.exchange import EventStream, Exchange, cancelled_when_client_leaves, event, exchange_of
from edge_phi3.api.schemas import ChatRequest, ChatResponse, TokenScore, Usage
from edge_phi3.api.service import Service
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.parameters import PARAMETERS
from edge_phi3.pipeline import GenerationOutput, PreparedPrompt, TextDelta

_READERS: Final[Mapping[type, Callable[[Any], Any]]] = {
    type_: pydantic.TypeAdapter[Any](type_).validate_python for type_ in (bool, int, float)
}
"""The original service's requests were pydantic's, which took `"30"` and `"true"`."""


def _scalar(type_: Any) -> type | None:
    """Return which of the readers' types a type is, or may be."""
    if type_ in _READERS:
        found: type = type_
        return found
    parts = get_args(type_) if get_origin(type_) in {Annotated, types.UnionType, Union} else ()
    return next(filter(None, map(_scalar, parts)), None)


_FIELDS: Final = dict.fromkeys(("return_full_text", "clean_up_tokenization_spaces", "stream"), bool)
_PARAMETERS: Final = {
    name: scalar for name, each in PARAMETERS.items() if (scalar := _scalar(each.value.kind.type)) is not None
}


@post("/chat", status_code=200, body=ChatRequest)
async def chat(
    request: Request[Any, Any, Any], body: RawBody, service: NamedDependency[Service]
) -> Response[ChatResponse] | EventStream:
    """Continue a prompt or a conversation."""
    exchange, prepare = exchange_of(request.scope), functools.partial(service.lanes.prepare, request, body)
    wanted = await prepare(lambda: decode_body(request, body, ChatRequest, functools.partial(_sift, service)))
    prepared = await prepare(lambda: _prepare(service, wanted, exchange), foreign=service.is_foreign(wanted.messages))
    if wanted.stream:
        return EventStream(_events(service, prepared, exchange))
    async with cancelled_when_client_leaves(request.receive):
        exchange.output = output = await service.generate(prepared, exchange.request_id)
    return Response(chat_response(output, prepared.config))


def _sift(service: Service, body: dict[str, Any]) -> Iterator[str]:
    """Read a body's values as the original did, and yield the fields that are ignored, or cut to what there is."""
    _read_laxly(body, _FIELDS)
    if isinstance(kwargs := body.get("generate_kwargs"), dict):
        _read_laxly(kwargs, _PARAMETERS)
        if isinstance(wanted := kwargs.get("max_length"), int):
            kwargs["max_length"] = min(wanted, service.pipeline.engine.max_length)
            if kwargs["max_length"] < wanted and kwargs.get("max_new_tokens") is None:
                yield "generate_kwargs.max_length"
    yield from (name for name in body if name not in ChatRequest.__struct_fields__)


def _read_laxly(values: dict[str, Any], types_: Mapping[str, type]) -> None:
    """Turn what pydantic takes for a truth value or a number into one, in place; the rest stays as it is."""
    for name in values.keys() & types_.keys():
        if isinstance(values[name], str | int | float):
            with contextlib.suppress(pydantic.ValidationError):
                values[name] = _READERS[types_[name]](values[name])


def _prepare(service: Service, wanted: ChatRequest, exchange: Exchange) -> PreparedPrompt:
    service.note_prompt(exchange, wanted.prompt or wanted.messages)
    return service.prepare(
        wanted.generate_kwargs or {},
        prompt=wanted.prompt,
        messages=wanted.messages and [{"role": turn.role, "content": turn.content} for turn in wanted.messages],
        prefix=wanted.prefix,
        return_full_text=wanted.return_full_text is not False,
        clean_up_tokenization_spaces=bool(wanted.clean_up_tokenization_spaces),
        handle_long_generation=wanted.handle_long_generation,
        adapter=_adapter(service, wanted.adapters),
    )


def _adapter(service: Service, wanted: str | list[str] | None) -> int:
    """Return the number of the adapter that a request names, or 0."""
    names = [wanted] if isinstance(wanted, str) else wanted or []
    _, *adapters = service.pipeline.names
    if len(names) > 1:
        raise InvalidRequestError("`adapters` may name one: llama.cpp computes a batch with one set of adapters.")
    if not set(names) <= set(adapters):
        there = f"one of {', '.join(adapters)}" if adapters else "left out: none is served (--lora NAME=FILE)"
        raise InvalidRequestError(f"`adapters` must be {there}.")
    return adapters.index(names[0]) + 1 if names else 0


async def _events(service: Service, prepared: PreparedPrompt, exchange: Exchange) -> AsyncGenerator[bytes, None]:
    """Yield the text as it comes, as ``{"index", "text"}``, and at last the plain response as the event "result"."""

    def encoded(item: TextDelta | GenerationOutput) -> bytes:
        if isinstance(item, TextDelta):
            return event({"index": item.index, "text": item.text})
        exchange.output = item
        return event(chat_response(item, prepared.config), "result")

    async with service.stream(prepared, exchange.request_id) as steps:
        async for items in steps:
            yield b"".join(map(encoded, items))


def chat_response(output: GenerationOutput, config: GenerationConfig) -> ChatResponse:
    """Return an answer as `/chat` sends it, with all that `return_dict_in_generate` adds."""
    if not config.return_dict_in_generate:
        return ChatResponse(output.text)
    # In JSON, null stands for a number that is infinite: msgspec writes it so.
    scored = output.scores
    scores = None if scored is None else [[TokenScore(*token) for token in sequence] for sequence in scored]
    usage = Usage(output.prompt_tokens, output.completion_tokens)
    return ChatResponse(output.text, output.sequences, output.sequences_scores, scores, usage)
