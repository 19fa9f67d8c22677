"""Request bodies: JSON in, a typed request out, and a sentence for everything that does not fit.

What would change the answer and cannot be had is refused; what else is unknown is ignored, and named.
"""

import codecs
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import structlog
from litestar import Request

from edge_phi3.api.errors import InvalidRequestError, RefusedError
from edge_phi3.api.exchange import Exchange, exchange_of
from edge_phi3.api.openai import fields
from edge_phi3.generation.parameters import PARAMETERS
from edge_phi3.generation.values import REFUSED, Refused

logger = structlog.get_logger(__name__)

RequestType = TypeVar("RequestType", bound=msgspec.Struct)

_JSON_NAMES = {
    "str": "a text",
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "object": "an object",
    "array": "a list",
    "null": "null",
}
_MISMATCH = re.compile(r"Expected `(?P<expected>.+?)`(?P<bound>[^,]*)(?:, got `(?P<got>.+?)`)?")
_UNKNOWN = re.compile(r"unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>.*)`", re.DOTALL)
_PLACE = re.compile(r" - at `(?:key in )?\$\.?(?P<path>.*)`$", re.DOTALL)

MOST_IGNORED, LONGEST_IGNORED = 16, 64
MOST_VALUES, COSTLY, ORDINARY = 1 << 18, 4, 19
"""How much a body may hold, as how many numbers a text, a name, a list or an object counts, as does each character of a
number beyond so many: the interpreter makes them in a few milliseconds, and does nothing else meanwhile."""
_MOST_LOGGED: Final = 1000
_OF_NUMBERS: Final = np.array([chr(byte) in "0123456789.eE+-" for byte in range(256)])
_logged: set[str] = set()
"""Ignored fields that the log has named, up to `_MOST_LOGGED`: strangers do not fill it."""

_decode = msgspec.json.Decoder().decode


def decode_body(
    request: Request[Any, Any, Any],
    body: bytes,
    type_: type[RequestType],
    sift: Callable[[Any], Iterable[str]] | None = None,
) -> RequestType:
    """Return a request's body as a request type; `InvalidRequestError` where it does not fit, naming the field.

    Fields that the type does not have are ignored, and named (see `ignore`). `sift` is another way to find what is
    named, which may refuse fields, and change the body. One that is said not to be JSON, or to be compressed, or a
    page's that does not say, is a `RefusedError`: browsers let any page send such a body anywhere.
    """
    headers = request.headers
    if (encoding := headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise RefusedError(415, f"The body is compressed ({encoding[:60]}); send it as it is.")
    unsaid = "nothing" if "origin" in headers or "sec-fetch-site" in headers else "application/json"
    media_type = headers.get("content-type", unsaid).partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise RefusedError(
            415, f"The body must be JSON, sent with `Content-Type: application/json`, not {media_type[:60]!r}."
        )
    if len(body) > MOST_VALUES // COSTLY and _weight(body) > MOST_VALUES:
        raise InvalidRequestError(
            f"The body holds more than {MOST_VALUES} numbers. Each text, name, list and object, and each character"
            f" of a number beyond {ORDINARY}, counts as {COSTLY}, and 4 backslashes as one."
        )
    try:
        document = _decode(body.removeprefix(codecs.BOM_UTF8))
        if isinstance(document, dict):
            ignored = sift(document) if sift else (name for name in document if name not in type_.__struct_fields__)
            ignore(exchange_of(request.scope), ignored)
        return msgspec.convert(document, type_)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(_explain(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    except (RecursionError, ValueError):
        raise InvalidRequestError("The body is nested too deeply, or holds a number that is too long.") from None


def _weight(body: bytes) -> int:
    """Return how much JSON holds, see `MOST_VALUES`, while other threads have the interpreter."""
    signs = np.frombuffer(body.rstrip(b"\\"), np.uint8)
    backslashes = np.flatnonzero(signs == ord("\\"))
    last = np.flatnonzero(np.diff(backslashes, append=-1) != 1)
    quotes = signs == ord('"')
    quotes[backslashes[last[np.diff(last, prepend=-1) % 2 == 1]] + 1] = False  # behind an odd number of them
    outside = signs[~np.logical_xor.accumulate(quotes)]  # of texts, but for the quotes that end them
    number = {sign: int(np.count_nonzero(outside == ord(sign))) for sign in '"[{,'}
    ends = np.flatnonzero(~_OF_NUMBERS[outside])
    beyond = np.diff(ends, prepend=-1, append=len(outside)) - 1 - ORDINARY
    costly = number['"'] + number["["] + number["{"] + int(beyond[beyond > 0].sum())
    return COSTLY * costly + number[","] + len(backslashes) // 4


def ignore(exchange: Exchange, names: Iterable[str]) -> None:
    """Name what is ignored of a request in a header of its answer, and what never was before in the log."""
    shown = [_shown(name) for name in itertools.islice(dict.fromkeys(names), MOST_IGNORED)]
    if not shown:
        return
    exchange.headers.append((b"x-ignored-fields", ", ".join(shown).encode()))
    new = [name for name in shown if name not in _logged][: _MOST_LOGGED - len(_logged)]
    if new:
        _logged.update(new)
        logger.warning("Fields of requests are ignored.", path=exchange.path, fields=", ".join(new))


def _shown(name: str) -> str:
    """Return a name as it can stand in a list in a header, at its end too."""
    shown = name[:LONGEST_IGNORED].encode("unicode_escape").decode().replace(",", r"\x2c")[:LONGEST_IGNORED]
    return shown if shown and shown == shown.strip() else f'"{shown[: LONGEST_IGNORED - 2]}"'


def _explain(message: str) -> str:
    place = _PLACE.search(message)
    path = place["path"] if place else ""
    what = message[: place.start()] if place else message
    if unknown := _UNKNOWN.search(what):
        name = unknown["name"]
        return f"`{path}` has a field `{name if len(name) <= 60 else name[:57] + '...'}`, which is not known there."
    if missing := _MISSING.search(what):
        return f"`{path}.{missing['name']}` is missing.".replace("`.", "`")
    subject = f"`{path}`" if path else "The body"
    if mismatch := _MISMATCH.search(what):
        allowed = " or ".join(_JSON_NAMES.get(name, name) for name in mismatch["expected"].split(" | "))
        got = f", but is {_JSON_NAMES.get(mismatch['got'], mismatch['got'])}" if mismatch["got"] else ""
        return f"{subject} must be {allowed}{mismatch['bound']}{got}."
    return f"{subject}: {what}."


def sift(type_: type[msgspec.Struct], body: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of fields that are ignored with a word; one that is refused is an `InvalidRequestError`."""
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


def _others(body: Mapping[str, Any], type_: type[msgspec.Struct], where: str = "") -> Iterator[str]:
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
