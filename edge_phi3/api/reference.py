"""The tables of docs/parameters.md and docs/api.md: generation parameters, and fields of OpenAI's API."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from edge_phi3.api.openai import fields
from edge_phi3.api.openai.responses import ResponsesRequest
from edge_phi3.generation.parameters import OPENAI_PARAMETERS, PARAMETERS, groups
from edge_phi3.generation.values import REFUSED, Parameter, Refused, Source

_PLACES = {
    fields.ChatCompletionMessage: "messages[].",
    fields.ContentPart: "messages[].content[].",
    fields.StreamOptions: "stream_options.",
}
_ROUTES: Mapping[type[Struct], str] = {
    fields.ChatCompletionRequest: "chat",
    fields.CompletionRequest: "completions",
    ResponsesRequest: "responses",
}


def of_parameters() -> str:
    """Return a table for each group of generation parameters, and one of what is refused."""
    parameters = PARAMETERS | OPENAI_PARAMETERS
    sections = []
    for group, names in groups(parameters).items():
        rows = [_row(name, parameters[name]) for name in names]
        sections.append(f"### {group}\n\n" + _table(["name", "type", "absent", "null", "meaning"], rows))
    refused = [
        (f"`{name}`" + (f" (`{json.dumps(each.harmless[0])}`)" if each.harmless else ""), each.reason)
        for name, each in REFUSED.items()
    ]
    return "\n\n".join([*sections, "### Refused\n\n" + _table(["name", "why"], _by_reason(refused))])


def of_fields() -> str:
    """Return the tables of the fields that are honoured, ignored and refused."""
    rows: dict[str, list[str]] = {}
    for type_, route in _ROUTES.items():
        for name, meaning in _honoured(type_).items():
            same = name in fields.SamplingFields.__struct_fields__
            if name not in rows:
                rows[name] = [f"`{name}`", "all" if same else route, meaning]
            elif not same:
                rows[name][1] += f", {route}"
                rows[name][2] += "" if meaning == rows[name][2] else f" In {route}: {meaning}"
    for name, meaning in _honoured(fields.StreamOptions).items():
        rows[f"stream_options.{name}"] = [f"`stream_options.{name}`", "chat, completions", meaning]
    tables = [_table(["honoured", "route", "as"], [rows[name] for name in sorted(rows) if rows[name][2]])]
    nested = [
        (f"{_PLACES[type_]}{name}", other) for type_, inside in fields.NESTED.items() for name, other in inside.items()
    ]
    for word, kind in (("ignored", fields.Ignored), ("refused", Refused)):
        others = [
            (f"`{name}`", f"{other.reason}; named" if getattr(other, "named", False) else other.reason)
            for name, other in [*fields.OTHERS.items(), *nested]
            if isinstance(other, kind)
        ]
        tables.append(_table([word, "since"], _by_reason(others)))
    return "\n\n".join(tables)


def _row(name: str, parameter: Parameter) -> list[str]:
    meaning = f"{parameter.meaning} {parameter.computed}".strip()
    type_ = parameter.value.kind.allowed.removeprefix("a ").removeprefix("an ")
    return [f"`{name}`", type_, _shown(parameter.absent), _shown(parameter.null), meaning]


def _shown(value: object) -> str:
    if isinstance(value, Source):
        return value.value
    if value is None:
        return "not set"
    return "none" if value == () else f"`{json.dumps(value)}`"


def _honoured(type_: type[Struct]) -> dict[str, str]:
    properties = msgspec.json.schema_components([type_])[1][type_.__name__]["properties"]
    return {name: _description(properties[name]) for name in type_.__struct_fields__}


def _description(schema: Mapping[str, Any]) -> str:
    return str(next((each["description"] for each in (schema, *schema.get("anyOf", ())) if "description" in each), ""))


def _by_reason(named: list[tuple[str, str]]) -> list[list[str]]:
    """Return a row for each reason, with all names that have it."""
    reasons: dict[str, list[str]] = {}
    for name, reason in named:
        reasons.setdefault(reason, []).append(name)
    return [[", ".join(names), reason] for reason, names in reasons.items()]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))
