"""What is made from the table of fields: docs/api.md's tables."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from edge_phi3.api.openai import fields
from edge_phi3.api.openai.responses import ResponsesRequest
from edge_phi3.generation.refused import Refused

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


def markdown() -> str:
    """Return the tables: of the fields that are honoured, ignored and refused."""
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
    return "\n\n".join(
        [
            _table(["honoured", "route", "as"], [rows[name] for name in sorted(rows) if rows[name][2]]),
            _table(["ignored", "since"], _by_reason(fields.Ignored)),
            _table(["refused", "since"], _by_reason(Refused)),
        ]
    )


def _honoured(type_: type[Struct]) -> dict[str, str]:
    properties = msgspec.json.schema_components([type_])[1][type_.__name__]["properties"]
    return {name: _description(properties[name]) for name in type_.__struct_fields__}


def _description(schema: Mapping[str, Any]) -> str:
    return str(next((each["description"] for each in (schema, *schema.get("anyOf", ())) if "description" in each), ""))


def _by_reason(kind: type[fields.Ignored | Refused]) -> list[list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, other in _others():
        if isinstance(other, kind):
            note = "; named" if isinstance(other, fields.Ignored) and other.named else ""
            reasons.setdefault(f"{other.reason}{note}", []).append(f"`{name}`")
    return [[", ".join(names), reason] for reason, names in reasons.items()]


def _others() -> Iterator[tuple[str, fields.Ignored | Refused]]:
    yield from fields.OTHERS.items()
    for type_, others in fields.NESTED.items():
        yield from ((f"{_PLACES[type_]}{name}", other) for name, other in others.items())


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))
