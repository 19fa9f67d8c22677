"""Whether the schemas of a ``oneOf`` exclude each other, so that a value that fits one fits exactly one."""

from __future__ import annotations

import json
from collections.abc import Mapping


def exclude_each_other(schemas: list[object]) -> bool:
    """Return whether no value can fit two of the schemas: they differ in type, or in a required property's constant."""
    told = [_marks(schema) for schema in schemas]
    return all(_differ(one, other) for at, one in enumerate(told) for other in told[:at])


def _marks(schema: object) -> dict[str, set[str]]:
    """Give, for the type ("") and each required property with constants, the values that it may have."""
    if not isinstance(schema, dict):
        return {}
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    # An integer is a number too.
    marks = {"": {"number" if kind == "integer" else str(kind) for kind in kinds}} if kinds else {}
    properties, required = schema.get("properties"), schema.get("required")
    if marks.get("") == {"object"} and isinstance(properties, dict) and isinstance(required, list):
        for name in required:
            each = properties.get(name) if isinstance(name, str) else None
            if isinstance(each, dict) and ("const" in each or isinstance(each.get("enum"), list)):
                values = [each["const"]] if "const" in each else each["enum"]
                marks[f"/{name}"] = {_mark(value) for value in values}
    return marks


def _mark(value: object) -> str:
    """Write a value so that equal ones, 1 and 1.0 among them, are written alike."""
    with_floats = json.loads(json.dumps(value), parse_int=float)
    return json.dumps(with_floats, sort_keys=True)


def _differ(one: Mapping[str, set[str]], other: Mapping[str, set[str]]) -> bool:
    return any(not one[mark] & other[mark] for mark in one.keys() & other.keys())
