"""Options in words: how one is declared, what it allows, what it is called, and a whole configuration as TOML."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ByteSize, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic.types import JsonValue


def option(default: Any, group: str, description: str, *, metavar: str | None = None, **constraints: Any) -> Any:
    """Declare one option: a pydantic field that also knows its group and metavar in ``--help``."""
    extra: dict[str, JsonValue] = {"group": group, "metavar": metavar}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def flag_of(name: str) -> str:
    """Return what a field is called on the command line: ``--ctx-size``, but ``MODEL`` for the argument."""
    return "MODEL" if name == "model" else f"--{key_of(name)}"


def key_of(name: str) -> str:
    """Return what a field is called in a TOML file: ``ctx_size`` -> ``ctx-size``."""
    return name.replace("_", "-")


def group_of(field: FieldInfo) -> str:
    """Return the heading under which ``--help`` shows a field."""
    return str(_extra(field)["group"])


def metavar_of(field: FieldInfo) -> str | None:
    """Return the placeholder of a field's value in ``--help``, or None to show its type."""
    metavar = _extra(field)["metavar"]
    return None if metavar is None else str(metavar)


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the words that a field may be, empty when it is not a choice of words."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def allowed_values(field: FieldInfo) -> str:
    """Say what a field may be: "a whole number from 0 to 65535", "one of f32, f16, q8_0"."""
    if choices := choices_of(field):
        return f"one of {', '.join(choices)}"
    metavar = metavar_of(field)
    if field.annotation is ByteSize:
        return f"a size such as 4MiB or 65536, {_range(field)}"
    if field.annotation is int:
        return f"a whole number {_range(field)}"
    if field.annotation is float:
        return f"a number {_range(field)}"
    if field.annotation is bool:
        return "true or false"
    example = {
        "auto|off|N": "auto, off, or a whole number from 1 to 64",
        "N/UNIT": "a count and a unit such as 60/minute (second, minute, hour, day)",
    }
    return example.get(metavar or "", f"{metavar}" if metavar else "a text that is not empty")


_NUMBER = r"(?P<scale>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)"
_SCALED = re.compile(rf"(?P<file>.+)={_NUMBER}")
_NAMED = re.compile(rf"(?P<name>[A-Za-z0-9][\w.-]*)(?<!\.gguf)=(?P<file>.+?)(:{_NUMBER})?")


def read_lora(text: str) -> tuple[str, str | float, str]:
    """Return the file, scale and name of a value of ``--lora``: what has a slash before its ``=`` is no name."""
    if scaled := _SCALED.fullmatch(text):
        return scaled["file"], scaled["scale"], ""
    if named := _NAMED.fullmatch(text):
        return named["file"], named["scale"] or 1.0, named["name"]
    file, _, scale = text.partition(".gguf=")
    return (text, 1.0, "") if "/" in scale or not scale else (f"{file}.gguf", scale, "")


def write_lora(path: Path, scale: float, name: str) -> str:
    """Return an adapter as `read_lora` reads it."""
    return f"{name}={path}:{scale:g}" if name else f"{path}={scale:g}"


def to_toml(settings: BaseModel) -> str:
    """Return all options as a TOML file that `Settings.load` reads back, each with its meaning as a comment.

    Keys of clients are not written: they belong in a file of their own or in the environment.
    """
    return "\n".join(_toml_lines(settings)) + "\n"


def _toml_lines(settings: BaseModel) -> Iterator[str]:
    values = settings.model_dump()
    group = ""
    for name, field in type(settings).model_fields.items():
        if group_of(field) != group:
            group = group_of(field)
            yield f"{'' if group == 'Model' else chr(10)}# -- {group} --"
        yield f"# {field.description}"
        key = key_of(name)
        value = values[name]
        if name == "api_key":
            yield f"# {key} = [] # {len(value)} given, not shown"
        elif value is None:
            yield f"# {key} ="
        else:
            yield f"{key} = {_toml_value(value)}"


def _toml_value(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    # A JSON string, number or boolean is also a TOML one.
    return json.dumps(value, ensure_ascii=False)


def _range(field: FieldInfo) -> str:
    low = next((item.ge for item in field.metadata if getattr(item, "ge", None) is not None), None)
    high = next((item.le for item in field.metadata if getattr(item, "le", None) is not None), None)
    return f"of at least {low}" if high is None else f"from {low} to {high}"


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return extra


def to_markdown(settings_class: type[BaseModel]) -> str:
    """Return all options as Markdown tables, one for each group."""
    groups: dict[str, list[str]] = {}
    for name, field in settings_class.model_fields.items():
        row = f"| `{flag_of(name)}` | {_values(field)} | {default_of(field)} | {field.description} |"
        groups.setdefault(group_of(field), []).append(row)
    head = "| option | values | default | meaning |\n| --- | --- | --- | --- |\n"
    return "\n\n".join(f"#### {group}\n\n{head}" + "\n".join(rows) for group, rows in groups.items())


def _values(field: FieldInfo) -> str:
    metavar = metavar_of(field)
    return f"`{metavar}`" if metavar and field.annotation is not ByteSize else allowed_values(field)


def default_of(field: FieldInfo) -> str:
    """Return a field's default as Markdown, empty where there is none."""
    if field.default in (None, ()):
        return ""
    shown = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{shown.removesuffix('.0')}`"


def explain(
    error: ValidationError, values: Mapping[str, object], origin: Mapping[str, str], fields: Mapping[str, FieldInfo]
) -> str:
    """Return what was wrong first with some values, which come from the places in `origin`, and what is allowed."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    shown = "the value" if name.startswith("api_key") else repr(values[name])
    if first["type"] == "value_error":
        return f"{origin[name]}: {shown} is not allowed: {first['ctx']['error']}".rstrip(".") + "."
    return f"{origin[name]}: {shown} is not allowed; give {allowed_values(fields[name])}."
