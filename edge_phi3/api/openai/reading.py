"""Bodies of ``/v1`` as the table of `edge_phi3.api.openai.fields` says: what is refused, and what is ignored."""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.openai import fields
from edge_phi3.generation.parameters import PARAMETERS
from edge_phi3.generation.refused import REFUSED, Refused


def sift(type_: type[Struct], body: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of fields that are ignored with a word.

    Raises:
        InvalidRequestError: a field is refused, or belongs into `generate_kwargs`.
    """
    for name in _others(body, type_):
        if name in PARAMETERS and type_ is not fields.TokenizeRequest:
            raise InvalidRequestError(f"`{name}` belongs inside `generate_kwargs`.")
        if (refused := REFUSED.get(name)) is not None:
            _check(name, body[name], refused)
        yield name
    for options in _objects([body.get("stream_options")]):
        yield from (f"stream_options.{name}" for name in _others(options, fields.StreamOptions, "stream_options."))
    for index, message in enumerate(_objects(body.get("messages"))):
        for name in _others(message, fields.ChatCompletionMessage, f"messages[{index}]."):
            yield f"messages[].{name}"
        for part in _objects(message.get("content")):
            yield from (f"messages[].content[].{name}" for name in _others(part, fields.ContentPart))


def _objects(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _others(body: Mapping[str, Any], type_: type[Struct], where: str = "") -> Iterator[str]:
    """Yield the fields that a type does not have and the table is silent about, or wants named; check the refused."""
    others = fields.NESTED.get(type_, fields.OTHERS)
    for name, value in body.items():
        if name in type_.__struct_fields__:
            continue
        other = others.get(name)
        if isinstance(other, Refused):
            _check(where + name, value, other)
        elif other is None or (other.named and value is not None):
            yield name


def _check(name: str, value: object, refused: Refused) -> None:
    if not refused.accepts(value):
        raise InvalidRequestError(f"`{name}` is not supported: {refused.reason}.")
