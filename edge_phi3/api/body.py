"""Request bodies: JSON in, a typed request out, and a sentence for everything that does not fit.

What would change the answer and cannot be had is refused; what else is unknown is ignored, and named.
"""

import codecs
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import msgspec
import structlog
from litestar import Request

from edge_phi3.api.errors import InvalidRequestError, UnsupportedMediaTypeError
from edge_phi3.api.exchange import Exchange, exchange_of

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
_MOST_LOGGED: Final = 1000
_logged: set[str] = set()
"""Ignored fields that the log has named, up to `_MOST_LOGGED`: strangers do not fill it."""

_decode = msgspec.json.Decoder().decode


def decode_body(
    request: Request[Any, Any, Any],
    body: bytes,
    type_: type[RequestType],
    sift: Callable[[Any], Iterable[str]] | None = None,
) -> RequestType:
    """Return a request's body as a request type.

    Fields that the type does not have are ignored, and named (see `ignore`). `sift` is another way to find what is
    named, which may refuse fields, and change the body.

    Raises:
        UnsupportedMediaTypeError: the body is said not to be JSON, or to be compressed, or is a page's that does not
            say: browsers let any page send such a body anywhere.
        InvalidRequestError: it is not JSON, or does not fit the type; the message names the field.
    """
    headers = request.headers
    if (encoding := headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise UnsupportedMediaTypeError(f"The body is compressed ({encoding[:60]}); send it as it is.")
    unsaid = "nothing" if "origin" in headers or "sec-fetch-site" in headers else "application/json"
    media_type = headers.get("content-type", unsaid).partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"The body must be JSON, sent with `Content-Type: application/json`, not {media_type[:60]!r}."
        )
    try:
        document = _decode(body.removeprefix(codecs.BOM_UTF8))
        if isinstance(document, dict):
            ignored = sift(document) if sift else (name for name in document if name not in type_.__struct_fields__)
            ignore(exchange_of(request.scope), ignored)
        decoded = msgspec.convert(document, type_)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(_explain(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    except (RecursionError, ValueError):
        raise InvalidRequestError("The body is nested too deeply, or holds a number that is too long.") from None
    return decoded


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
