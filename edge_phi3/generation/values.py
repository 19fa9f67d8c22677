"""The kinds of values that generation parameters take.

A `Kind` is said once and used everywhere: it reads a value from JSON, names what is allowed in an error, and makes the
JSON schema and the words of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edge_phi3.errors import EdgePhi3Error

Schema = dict[str, Any]

_LONGEST_SHOWN = 60


class ParameterError(EdgePhi3Error):
    """A parameter is unknown, unsupported, of the wrong type, out of range, or at odds with another.

    Attributes:
        parameter: the name as the request gave it.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class _MisfitError(Exception):
    """A value does not have a kind's type. Its text, if any, is what is allowed, where that is not the kind's own."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of values, and which of them are allowed.

    Attributes:
        allowed: completes the sentence "`name` must be ...".
        label: the same in the few words of a table.
        schema: the JSON schema.
        convert: takes a value from JSON and returns it as the configuration holds it; raises `_MisfitError`.
        token_ids: the token ids in a converted value that must lie within the vocabulary.
        limits: the ``minimum``, ``maximum``, ``exclusiveMinimum`` and ``exclusiveMaximum`` of numbers.
        hint: what else helps whoever gave a number out of range.
    """

    allowed: str
    label: str
    schema: Schema
    convert: Callable[[object], Any]
    token_ids: Callable[[Any], Iterable[int]] = lambda _: ()
    limits: Mapping[str, float] = field(default_factory=dict)
    hint: str = ""

    def read(self, name: str, value: object) -> Any:
        """Return a value from JSON as the configuration holds it. Its range is `check`'s affair.

        Raises:
            ParameterError: the value has another type.
        """
        try:
            return self.convert(value)
        except _MisfitError as error:
            raise ParameterError(name, f"`{name}` must be {str(error) or self.allowed}, but is {_shown(value)}.") from None

    def check(self, name: str, value: float | None) -> None:
        """Raise `ParameterError` when a number that `read` returned lies outside the limits."""
        low, high = self.limits.get("minimum", -math.inf), self.limits.get("maximum", math.inf)
        above, below = self.limits.get("exclusiveMinimum", -math.inf), self.limits.get("exclusiveMaximum", math.inf)
        if self.limits and value is not None and not (low <= value <= high and above < value < below):
            hint = f"; {self.hint}" if self.hint else ""
            raise ParameterError(name, f"`{name}` must be {self.allowed}, but is {_shown(value)}{hint}.")


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_SHOWN else shown[: _LONGEST_SHOWN - 3] + "..."


# -- numbers and truth values


def integer(minimum: int | None = None, maximum: int | None = None, *, hint: str = "") -> Kind:
    """Return the kind of integers within limits."""
    limits = {"minimum": minimum, "maximum": maximum}
    return _number("integer", _read_integer, limits, noun="an integer", hint=hint)


def number(noun: str = "a number", *, hint: str = "", **limits: float) -> Kind:
    """Return the kind of finite numbers within limits, which are named as in JSON schemas.

    Args:
        noun: what it is called in errors.
        hint: what else helps whoever gave a number out of range.
        limits: ``minimum``, ``maximum``, ``exclusiveMinimum``, ``exclusiveMaximum``.
    """
    return _number("number", _read_number, limits, noun=noun, hint=hint)


def _number(
    type_: str, convert: Callable[[object], Any], limits: Mapping[str, float | None], *, noun: str, hint: str
) -> Kind:
    given = {name: limit for name, limit in limits.items() if limit is not None}
    low, high = given.get("minimum"), given.get("maximum")
    above, below = given.get("exclusiveMinimum"), given.get("exclusiveMaximum")
    if low is not None and high is not None:
        words, short = f" from {low} to {high}", f", {low} to {high}"
    else:
        parts = [
            f"of at least {low}" if low is not None else f"above {above}" if above is not None else "",
            f"at most {high}" if high is not None else f"below {below}" if below is not None else "",
        ]
        words = "".join(f" {part}" for part in [" and ".join(filter(None, parts))] if part)
        signs = [("≥", low), (">", above), ("≤", high), ("<", below)]
        short = ",".join(f" {sign} {limit}" for sign, limit in signs if limit is not None)
    return Kind(noun + words, type_ + short, {"type": type_, **given}, convert, limits=given, hint=hint)


def _read_integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _MisfitError
    return value


def _read_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _MisfitError
    try:
        read = float(value)
    except OverflowError:
        read = math.inf
    if not math.isfinite(read):
        raise _MisfitError("a finite number")
    return read


def _read_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _MisfitError
    return value


def _read_early_stopping(value: object) -> bool | str:
    if isinstance(value, bool) or value == "never":
        return value
    raise _MisfitError


BOOLEAN = Kind("true or false", "boolean", {"type": "boolean"}, _read_boolean)
EARLY_STOPPING = Kind(
    'true, false or "never"', 'boolean or `"never"`', {"enum": [True, False, "never"]}, _read_early_stopping
)

# -- texts


def _read_texts(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise _MisfitError
    return tuple(texts)


_TEXT = {"type": "string", "minLength": 1}
TEXTS = Kind(
    "a non-empty string or a non-empty list of them",
    "string, or a list of them; none empty",
    {"oneOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    _read_texts,
)

# -- token ids


def _read_ids(value: object, minimum: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise _MisfitError
    if not all(type(item) is int and (minimum is None or item >= minimum) for item in value):
        raise _MisfitError
    return tuple(value)


def _read_one_or_many(minimum: int) -> Callable[[object], tuple[int, ...]]:
    return lambda value: _read_ids(value if isinstance(value, list | tuple) else [value], minimum)


def _read_phrases(value: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise _MisfitError
    phrases = tuple(_read_ids(phrase, 0) for phrase in value)
    if not all(phrases):
        raise _MisfitError
    return phrases


def _read_biases(value: object) -> tuple[tuple[tuple[int, ...], float], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise _MisfitError
    biases: dict[tuple[int, ...], float] = {}
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _MisfitError
        tokens = _read_ids(pair[0], 1)
        if not tokens:
            raise _MisfitError
        biases[tokens] = _read_number(pair[1])
    return tuple(biases.items())


def _read_start_and_factor(value: object) -> tuple[int, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _MisfitError
    return _read_integer(value[0]), _read_number(value[1])


_ID: Schema = {"type": "integer", "minimum": 0}
_IDS: Schema = {"type": "array", "items": _ID}

TOKEN = replace(integer(0), label="token id", token_ids=lambda token: (token,))
TOKENS = Kind("a list of token ids", "list of token ids", _IDS, _read_ids)
TOKEN_OR_TOKENS = Kind(
    "a token id or a list of token ids",
    "token id, or a list of them",
    {"oneOf": [_ID, _IDS]},
    _read_one_or_many(0),
    token_ids=tuple,
)
END_TOKENS = Kind(
    "a token id or a list of token ids (-1: none)",
    "token id, or a list of them",
    {"oneOf": [{**_ID, "minimum": -1}, {"type": "array", "items": {**_ID, "minimum": -1}}]},
    _read_one_or_many(-1),
    token_ids=tuple,
)
PHRASES = Kind(
    "a non-empty list of non-empty lists of token ids",
    "list of lists of token ids",
    {"type": "array", "items": {**_IDS, "minItems": 1}, "minItems": 1},
    _read_phrases,
    token_ids=lambda phrases: (token for phrase in phrases for token in phrase),
)
BIASES = Kind(
    "a non-empty list of pairs [[positive token ids], number]",
    "list of `[[token ids], number]`, ids above 0",
    {"type": "array", "items": {"type": "array", "minItems": 2, "maxItems": 2}, "minItems": 1},
    _read_biases,
    token_ids=lambda biases: (token for phrase, _ in biases for token in phrase),
)
START_AND_FACTOR = Kind(
    "a pair [start, factor] of an integer and a number",
    "`[integer, number]`",
    {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number"}},
    _read_start_and_factor,
)
