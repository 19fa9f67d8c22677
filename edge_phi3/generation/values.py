"""What describes a generation parameter: the kind of its values, its defaults, its meaning; or why it is refused.

A `Kind` is said once and used everywhere: it reads a value from JSON, names what is allowed in an error, and makes the
JSON schema and the words of the reference. msgspec does the reading and the schemas.
"""

import enum
import json
import math
import operator
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from edge_phi3.errors import EdgePhi3Error

Schema = dict[str, Any]

LONGEST_SHOWN = 60
"""Characters of a name or value of a request in the sentence that refuses it."""
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = LONGEST_SHOWN
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 20
_LIMITS: Final[Mapping[str, tuple[str, Callable[[Any, Any], bool]]]] = {
    "minimum": ("of at least", operator.ge),
    "exclusiveMinimum": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "exclusiveMaximum": ("below", operator.lt),
}


class ParameterError(EdgePhi3Error):
    """A parameter is unknown, unsupported, of the wrong type, out of range, or at odds with another.

    Attributes:
        parameter: the name as the request gave it.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of values, and which of them are allowed.

    Attributes:
        allowed: completes the sentence "`name` must be ...", and `hint` the one on a number out of range.
        type: what msgspec converts JSON to; all numbers in it must be finite.
        token_ids: whether the integers in it are token ids, which must lie within the vocabulary.
        limits: the ``minimum``, ``maximum``, ``exclusiveMinimum`` and ``exclusiveMaximum`` of numbers.
        one_or_many: whether a single value stands for a list of it.
        schema: the JSON schema, where it is not the one that follows from `type` and `limits`.
    """

    allowed: str
    type: Any
    token_ids: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    hint: str = ""
    one_or_many: bool = False
    schema: Schema | None = None

    def read(self, name: str, value: object) -> Any:
        """Return a value from JSON as the configuration holds it, a list as a tuple; `check` looks at its limits."""
        try:
            read = msgspec.convert(value, self.type)
        except (msgspec.ValidationError, OverflowError):
            raise self._refusal(name, value) from None
        if not all(math.isfinite(leaf) for leaf in leaves(read) if isinstance(leaf, float)):
            raise self._refusal(name, value)
        return (read,) if self.one_or_many and not isinstance(read, tuple) else read

    def check(self, name: str, value: float | None) -> None:
        """Raise `ParameterError` when a number that `read` returned lies outside the limits."""
        if value is not None and not all(_LIMITS[each][1](value, limit) for each, limit in self.limits.items()):
            raise self._refusal(name, value, self.hint and f"; {self.hint}")

    def _refusal(self, name: str, value: object, hint: str = "") -> ParameterError:
        return ParameterError(name, f"`{name}` must be {self.allowed}, but is {shown(value)}{hint}.")

    def json_schema(self) -> Schema:
        """Return the JSON schema."""
        return self.schema or {**msgspec.json.schema(self.type), **self.limits}


def shown(value: object) -> str:
    """Return a value as a sentence shows it, however large it is."""
    text = _BRIEF.repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def leaves(value: object) -> Iterator[object]:
    """Yield what nested tuples hold, or the value itself."""
    if isinstance(value, tuple):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def integer(minimum: int, maximum: int | None = None, *, hint: str = "") -> Kind:
    """Return the kind of integers within limits."""
    limits = {"minimum": minimum} | ({} if maximum is None else {"maximum": maximum})
    return _limited("an integer", int, limits, hint)


def number(*, hint: str = "", **limits: float) -> Kind:
    """Return the kind of finite numbers within limits, which are named as in `Kind.limits`."""
    return _limited("a number", float, limits, hint)


def _limited(noun: str, type_: type, limits: Mapping[str, float], hint: str) -> Kind:
    words = " and ".join(f"{_LIMITS[name][0]} {limit}" for name, limit in limits.items())
    if limits.keys() == {"minimum", "maximum"}:
        words = f"from {limits['minimum']} to {limits['maximum']}"
    return Kind(f"{noun} {words}".strip(), type_, limits=limits, hint=hint)


_Text = Annotated[str, msgspec.Meta(min_length=1)]
_ID = Annotated[int, msgspec.Meta(ge=0)]
_PositiveID = Annotated[int, msgspec.Meta(ge=1)]
_EndID = Annotated[int, msgspec.Meta(ge=-1)]
_SOME = msgspec.Meta(min_length=1)

BOOLEAN = Kind("true or false", bool)
EARLY_STOPPING = Kind('true, false or "never"', bool | Literal["never"], schema={"enum": [True, False, "never"]})
TEXTS = Kind(
    "a non-empty string or a non-empty list of them", _Text | Annotated[tuple[_Text, ...], _SOME], one_or_many=True
)
TOKEN = Kind("a token id", _ID, token_ids=True)
TOKENS = Kind("a list of token ids", tuple[int, ...])
TOKEN_OR_TOKENS = Kind("a token id or a list of them", _ID | tuple[_ID, ...], token_ids=True, one_or_many=True)
END_TOKENS = Kind(
    "a token id or a list of them (-1: none)", _EndID | tuple[_EndID, ...], token_ids=True, one_or_many=True
)
PHRASES = Kind(
    "a non-empty list of non-empty lists of token ids",
    Annotated[tuple[Annotated[tuple[_ID, ...], _SOME], ...], _SOME],
    token_ids=True,
)
BIASES = Kind(
    "a non-empty list of pairs [[positive token ids], number]",
    Annotated[tuple[tuple[Annotated[tuple[_PositiveID, ...], _SOME], float], ...], _SOME],
    token_ids=True,
)
START_AND_FACTOR = Kind("a pair [start, factor] of an integer and a number", tuple[int, float])


class Source(enum.Enum):
    """Where a value comes from that is not written in the table."""

    INHERIT = "inherit"
    """For null: the model's ``generation_config.json``, or else the default of transformers."""
    MODEL = "the model's"
    """For a default: the model file."""
    UNSET = "not given"
    """In a `Value`: what its description says."""


@dataclass(frozen=True, slots=True)
class Value:
    """Which values a parameter takes.

    Attributes:
        default: the value when neither request, API, nor ``generation_config.json`` gives one.
        api: the value when a request is silent, which wins over the model's ``generation_config.json``; `UNSET` where
            the API has no default of its own.
        null: the value that an explicit null stands for; the default unless given.
        example: a value that is accepted; the one of a silent request unless given.
        with_sampling: whether the range is checked only when `do_sample` is true, as transformers does.
    """

    kind: Kind
    default: object
    api: object = Source.UNSET
    null: object = Source.UNSET
    example: object = Source.UNSET
    with_sampling: bool = False


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter.

    Attributes:
        group: the section of the playground's panel and of the reference that it stands in.
        meaning: what it does, for somebody who sets it.
        computed: how it is computed, and what else an exact user has to know; Markdown.
        openai: whether it belongs to OpenAI's API alone, and not to ``generate_kwargs``.
    """

    group: str
    value: Value
    meaning: str
    computed: str = ""
    openai: bool = False

    @property
    def absent(self) -> object:
        """What a request means that does not name the parameter."""
        return self.value.default if self.value.api is Source.UNSET else self.value.api

    @property
    def null(self) -> object:
        """What an explicit null stands for."""
        return self.value.default if self.value.null is Source.UNSET else self.value.null

    def read(self, name: str, value: object) -> Any:
        """Return a value from JSON as the configuration holds it, or raise `ParameterError`."""
        read = self.value.kind.read(name, value)
        if not self.value.with_sampling:
            self.value.kind.check(name, read)
        return read

    def json_schema(self) -> Schema:
        """Return the JSON schema, with meaning, default and example."""
        absent, example = self.absent, self.value.example
        schema: Schema = {
            "anyOf": [self.value.kind.json_schema(), {"type": "null"}],
            "description": self.meaning,
            "examples": [absent if example is Source.UNSET else example],
        }
        if absent not in (None, (), Source.MODEL):
            schema["default"] = absent
        return schema


def parameter(group: str, value: Value, meaning: str, computed: str = "", *, openai: bool = False) -> Any:
    """Return a dataclass field that carries its `Parameter`."""
    described = Parameter(group, value, meaning, computed, openai)
    return field(default=value.default if openai else MISSING, metadata={"parameter": described})


@dataclass(frozen=True, slots=True)
class Refused:
    """One name of transformers that cannot be had here; `reason` completes the sentence "`name` is not supported: ...".

    `harmless` values, beside null, change nothing, and are accepted. Where another one would not change which tokens
    are chosen, a model's ``generation_config.json`` may hold it: see `changes_tokens`.
    """

    reason: str
    harmless: tuple[object, ...] = ()
    changes_tokens: bool = True

    def accepts(self, value: object) -> bool:
        """Return whether `value` changes nothing."""
        return value is None or any(type(value) is type(known) and value == known for known in self.harmless)


_GROUPS = json.loads(Path(__file__).with_name("refused.json").read_text(encoding="utf-8"))
REFUSED: Final[Mapping[str, Refused]] = {
    name: Refused(group["reason"], tuple(more.get("harmless", ())), changes_tokens=more.get("changes_tokens", True))
    for group in _GROUPS
    for name, more in group["names"].items()
}
"""Every name of ``GenerationConfig`` 4.49.0 and ``generate()`` that is refused unless its value changes nothing."""
