"""Request bodies: JSON in, a typed request out, and a sentence for everything that does not fit.

Long texts are turned into tokens, or back, beside the event loop, which meanwhile answers others.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from litestar import Request

from edge_phi3.api.errors import InvalidRequestError, UnsupportedMediaTypeError
from edge_phi3.generation.parameters import PARAMETERS

RequestType = TypeVar("RequestType", bound=msgspec.Struct)
Result = TypeVar("Result")

_LONG = 32 * 1024
"""Bytes of a body that are prepared in ten to twenty milliseconds on two cores of an EPYC. Short texts are spared the
fraction of a millisecond that it takes to reach a thread."""

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

_decoder = functools.cache(msgspec.json.Decoder)


def decode_body(request: Request[Any, Any, Any], body: bytes, type_: type[RequestType]) -> RequestType:
    """Return a request's body as a request type, which forbids unknown fields.

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
        decoded: RequestType = _decoder(type_).decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(_explain(str(error), type_)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
    except (RecursionError, ValueError):
        raise InvalidRequestError("The body is nested too deeply, or holds a number that is too long.") from None
    return decoded


async def work_on(body: bytes, work: Callable[[], Result], *, slow: bool = False) -> Result:
    """Return what `work` returns, called at once, or in a thread when it is slow or the request's body is long."""
    return await asyncio.to_thread(work) if slow or len(body) >= _LONG else work()


def _explain(message: str, type_: type[msgspec.Struct]) -> str:
    place = _PLACE.search(message)
    path = place["path"] if place else ""
    what = message[: place.start()] if place else message
    if unknown := _UNKNOWN.search(what):
        return _unknown_field(unknown["name"], path, type_)
    if missing := _MISSING.search(what):
        return f"`{path}.{missing['name']}` is missing.".replace("`.", "`")
    subject = f"`{path}`" if path else "The body"
    if mismatch := _MISMATCH.search(what):
        allowed = " or ".join(_JSON_NAMES.get(name, name) for name in mismatch["expected"].split(" | "))
        got = f", but is {_JSON_NAMES.get(mismatch['got'], mismatch['got'])}" if mismatch["got"] else ""
        return f"{subject} must be {allowed}{mismatch['bound']}{got}."
    return f"{subject}: {what}."


def _unknown_field(name: str, path: str, type_: type[msgspec.Struct]) -> str:
    shown = name if len(name) <= 60 else name[:57] + "..."
    if path:
        return f"`{path}` has a field `{shown}`, which is not known there."
    fields = [field.name for field in msgspec.structs.fields(type_)]
    if name in PARAMETERS and "generate_kwargs" in fields:
        return f"`{name}` belongs inside `generate_kwargs`."
    close = difflib.get_close_matches(name, fields, n=2)
    hint = f"did you mean {' or '.join(f'`{field}`' for field in close)}?" if close else f"known: {', '.join(fields)}."
    return f"`{shown}` is not a field of this request; {hint}"
