"""What answers are held to: a format, as OpenAI, vLLM and llama-server spell it, and calls of tools."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.openai.fields import ResponseFormat, SamplingFields
from edge_phi3.api.openai.tools import ToolUse
from edge_phi3.api.service import Service
from edge_phi3.engine.errors import SchemaError
from edge_phi3.engine.grammars import (
    Grammar,
    calls_grammar,
    choice_grammar,
    json_grammar,
    regex_grammar,
    written_grammar,
)
from edge_phi3.pipeline import PreparedPrompt


def _json(schema: object) -> Grammar:
    """Return the grammar of a schema, which may be written as a text."""
    try:
        return json_grammar(json.loads(schema) if isinstance(schema, str) else schema)
    except (ValueError, RecursionError):
        raise SchemaError("it is not valid JSON") from None


_KINDS: Final[Mapping[str, Callable[[Any], Grammar]]] = {
    "json": _json,
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": written_grammar,
    "json_object": lambda _: _json({"type": "object"}),
}
_FIELDS: Final = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "grammar": "grammar",
    "json_schema": "json",
}
"""Fields of requests, and what they are."""


def is_held(request: SamplingFields) -> bool:
    """Return whether a request asks for a format, or for calls."""
    names = (*_FIELDS, "structured_outputs", "response_format", "tools")
    return any(getattr(request, name, None) for name in names)


def held(service: Service, prepared: PreparedPrompt, request: SamplingFields, use: ToolUse | None) -> PreparedPrompt:
    """Return a prepared request whose answers are held to what it asks for; `InvalidRequestError` where none can be."""
    parts = wanted = _wanted(request)
    if use is not None:
        tools = [(f"tools[{index}].function.parameters", "json", schema) for index, _, schema in use.allowed]
        parts = [*wanted, *tools]
    elif not wanted:
        return prepared
    subject = "tools" if use else wanted[0][0]
    try:
        service.pipeline.schema_limits.check(*(value for _, _, value in parts))
        answers = [_KINDS[kind](value) for _, kind, value in wanted]
        if use is None:
            return service.pipeline.constrain(prepared, answers[0])
        grammar = calls_grammar(
            [(name, schema) for _, name, schema in use.allowed],
            service.pipeline.call_tokens,
            answer=answers[0] if answers else None,
            may_answer=use.may_answer,
            parallel=use.parallel,
        )
        return service.pipeline.constrain(prepared, grammar)
    except SchemaError as error:
        if use is not None:
            subject = _culprit(service, prepared, parts) or subject
        raise InvalidRequestError(f"`{subject}` cannot be followed: {str(error).rstrip('.')}.") from None


def _culprit(service: Service, prepared: PreparedPrompt, parts: list[tuple[str, str, Any]]) -> str | None:
    """Return the field that cannot be followed even alone."""
    for subject, kind, value in parts:
        try:
            service.pipeline.constrain(prepared, _KINDS[kind](value))
        except SchemaError:
            return subject
    return None


def _wanted(request: SamplingFields) -> list[tuple[str, str, Any]]:
    """Return the field that says what the answer is, its kind, and its value, if there is one."""
    fields = [(name, kind, getattr(request, name)) for name, kind in _FIELDS.items()]
    others = request.structured_outputs or {}
    fields += [(f"structured_outputs.{kind}", kind, value) for kind, value in others.items() if value is not False]
    found = [each for each in fields if each[2] not in (None, "", [])]
    for subject, kind, _ in found:
        if kind not in _KINDS:
            raise InvalidRequestError(f"`{subject}` is not supported; {', '.join(_KINDS)} are.")
    if request.response_format is not None and request.response_format.type != "text":
        found.append(_formatted(request.response_format))
    if len(found) > 1:
        raise InvalidRequestError(f"Give `{found[0][0]}` or `{found[1][0]}`, not both.")
    for subject, kind, value in found:
        if kind == "choice" and not (isinstance(value, list) and all(isinstance(each, str) and each for each in value)):
            raise InvalidRequestError(f"`{subject}` must be a list of texts, none of them empty.")
        if kind in {"regex", "grammar"} and not isinstance(value, str):
            raise InvalidRequestError(f"`{subject}` must be a text.")
    return found


def _formatted(wanted: ResponseFormat) -> tuple[str, str, Any]:
    if wanted.type not in {"json_object", "json_schema"}:
        raise InvalidRequestError(
            f"`response_format.type` must be text, json_object or json_schema, not {wanted.type[:40]!r}."
        )
    if wanted.type == "json_schema" and wanted.json_schema and wanted.json_schema.schema_ is not None:
        return "response_format.json_schema.schema", "json", wanted.json_schema.schema_
    if wanted.schema_ is not None:
        return "response_format.schema", "json", wanted.schema_
    if wanted.type == "json_schema":
        raise InvalidRequestError("`response_format.json_schema.schema` is missing.")
    return "response_format", "json_object", True
