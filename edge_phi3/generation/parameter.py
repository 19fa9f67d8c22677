"""What is known about one generation parameter: the row of a table that everything else is made from."""

from __future__ import annotations

import enum
from dataclasses import MISSING, dataclass, field
from typing import Any

from edge_phi3.generation.values import Kind, Schema


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
        kind: its type and range.
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
        value: which values it takes.
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
        """Return a value from JSON as the configuration holds it.

        Raises:
            ParameterError: it has the wrong type, or is out of range.
        """
        read = self.value.kind.read(name, value)
        if not self.value.with_sampling:
            self.value.kind.check(name, read)
        return read

    def json_schema(self) -> Schema:
        """Return the JSON schema, with meaning, default and example."""
        absent = self.absent
        example = absent if self.value.example is Source.UNSET else self.value.example
        schema: Schema = {
            "anyOf": [self.value.kind.schema, {"type": "null"}],
            "description": self.meaning,
            "examples": [example],
        }
        if absent not in (None, (), Source.MODEL):
            schema["default"] = absent
        return schema


def parameter(group: str, value: Value, meaning: str, computed: str = "", *, openai: bool = False) -> Any:
    """Return a dataclass field that carries its `Parameter`."""
    described = Parameter(group, value, meaning, computed, openai)
    return field(default=value.default if openai else MISSING, metadata={"parameter": described})
