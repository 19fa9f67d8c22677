"""Write what follows from the code: tables in docs/, and the Helm chart's table of values and schema.

Usage: python scripts/update_docs.py [--check]

The tables of docs/ are made from the code that they describe, and the chart's from values.yaml, whose comments stand
above the values. The schema is made from what the service knows, so that a wrong option, quantisation or model fails
when a release is installed.
"""

import functools
import json
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ByteSize

from edge_phi3.api import reference
from edge_phi3.catalog import DEMO, PRESETS
from edge_phi3.conversion.quantization_types import ALIASES, QUANTIZATION_TYPES
from edge_phi3.files import atomic_output
from edge_phi3.options import allowed_values, flag_of, group_of, key_of, metavar_of
from edge_phi3.settings import Settings
from scripts import limits

ROOT = Path(__file__).resolve().parents[1]
CHART = "helm/edge-phi3"
BEGIN, END = "<!-- made by scripts/update_docs.py -->", "<!-- end of what is made -->"

SET_BY_THE_CHART = frozenset({"model", "quant", "store", "port", "grace_period", "api_key", "api_key_file"})
"""Options that other values of the chart give, or that its objects rely on."""

_KEY = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+):(?P<rest>.*)")


def rows(text: str) -> Iterator[tuple[str, Any, str]]:
    """Return the path, default and description of each value that has a comment, in the file's order."""
    values = yaml.safe_load(text)
    comment: list[str] = []
    parents: list[str] = []
    described: str | None = None
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip()[1:].strip())
        elif match := _KEY.fullmatch(line):
            depth = len(match["indent"]) // 2
            parents[depth:] = [match["key"]]
            path = ".".join(parents)
            if described is not None and path.startswith(described + "."):
                continue
            described = None
            value = functools.reduce(operator.getitem, parents, values)
            if comment:
                described = path
                yield path, value, " ".join(comment)
            elif not isinstance(value, dict) or match["rest"]:
                raise SystemExit(f"{path} in values.yaml has no comment above it.")
            comment = []
        elif not line.strip():
            comment = []


def table(text: str) -> str:
    """Return the table of values as Markdown."""
    lines = ["| value | default | what it is |", "| --- | --- | --- |"]
    for path, default, description in rows(text):
        shown = json.dumps(default, ensure_ascii=False).replace("|", "\\|")
        lines.append(f"| `{path}` | `{shown}` | {description.replace('|', '&#124;')} |")
    return "\n".join(lines)


def options_tables() -> str:
    """Return the service's options as Markdown tables, one for each group."""
    groups: dict[str, list[str]] = {}
    for name, field in Settings.model_fields.items():
        metavar = metavar_of(field)
        values = f"`{metavar}`" if metavar and field.annotation is not ByteSize else allowed_values(field)
        row = f"| `{flag_of(name)}` | {values} | {limits.default_of(field)} | {field.description} |"
        groups.setdefault(group_of(field), []).append(row)
    head = "| option | values | default | meaning |\n| --- | --- | --- | --- |\n"
    return "\n\n".join(f"#### {group}\n\n{head}" + "\n".join(rows) for group, rows in groups.items())


def options_schema() -> dict[str, Any]:
    """Return the JSON schema of ``serve.options``: the service's flags, each with its type and range."""
    described = Settings.model_json_schema()["properties"]
    properties = {key_of(name): _flag_schema(described[name]) for name in described if name not in SET_BY_THE_CHART}
    return {
        "type": "object",
        "description": "Options of `edge-phi3 serve`, by flag.",
        "additionalProperties": False,
        "properties": dict(sorted(properties.items())),
    }


def _flag_schema(field: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in field.get("anyOf", [field]) if kind["type"] != "null"]
    kept = ("type", "enum", "minimum", "maximum", "minLength", "pattern", "items")
    taken = [{key: kind[key] for key in kept if key in kind} for kind in kinds]
    for kind in taken:
        if re.fullmatch(kind.get("pattern", "-"), "1"):
            kind["type"] = ["string", "integer"]
        if kind["type"] == "array":
            # A repeatable flag: the service reads each text as it reads it from the command line.
            kind.update(type=["array", "string"], minLength=1, items={"type": "string", "minLength": 1})
        # null takes an option away that another file of values gives.
        kind["type"] = [*([kind["type"]] if isinstance(kind["type"], str) else kind["type"]), "null"]
        if "enum" in kind:
            kind["enum"] = [*kind["enum"], None]
    schema = taken[0] if len(taken) == 1 else {"anyOf": taken}
    return {"description": field["description"], **schema}


def updated_schema(text: str) -> str:
    """Return values.schema.json with the parts that follow from the service."""
    schema = json.loads(text)
    schema["properties"]["serve"]["properties"]["options"] = options_schema()
    model = schema["properties"]["model"]["properties"]
    model["quant"]["enum"] = [*QUANTIZATION_TYPES, *ALIASES]
    # A preset, or what has a slash: a repository, a file in one, a path.
    model["name"] = {"anyOf": [{"enum": ["demo", DEMO, *PRESETS]}, {"type": "string", "pattern": "/"}]}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def empty_values() -> str:
    """Return what null means for each value of the chart: nothing for a list or a map, and otherwise the default."""

    def empty(path: list[str], value: Any) -> Any:
        if isinstance(value, list):
            return []
        if isinstance(value, dict):
            return {} if ".".join(path) in leaves else {key: empty([*path, key], value[key]) for key in value}
        return value

    text = (ROOT / CHART / "values.yaml").read_text(encoding="utf-8")
    leaves = {path for path, _, _ in rows(text)}
    return json.dumps(empty([], yaml.safe_load(text)), indent=2) + "\n"


def between_marks(make: Callable[[], str], text: str) -> str:
    """Return a page with what stands between its two marks made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{make()}\n\n{END}{after}"


PAGES: Final[Mapping[str, Callable[[str], str]]] = {
    "docs/api.md": functools.partial(between_marks, reference.of_fields),
    "docs/parameters.md": functools.partial(between_marks, reference.of_parameters),
    "docs/security.md": functools.partial(between_marks, limits.markdown),
    "docs/cli.md": functools.partial(between_marks, options_tables),
    f"{CHART}/README.md": functools.partial(
        between_marks, lambda: table((ROOT / CHART / "values.yaml").read_text(encoding="utf-8"))
    ),
    f"{CHART}/values.schema.json": updated_schema,
    f"{CHART}/files/empty-values.json": lambda _: empty_values(),
}
"""How each file is brought up to date."""


def updated(name: str) -> str:
    """Return a file as it should be."""
    return PAGES[name]((ROOT / name).read_text(encoding="utf-8"))


def main() -> int:
    """Update the files, or with ``--check`` return 1 when one is out of date."""
    check, stale = "--check" in sys.argv[1:], False
    for name in PAGES:
        text = updated(name)
        if (ROOT / name).read_text(encoding="utf-8") == text:
            continue
        stale = True
        print(f"{name} {'is out of date; run scripts/update_docs.py' if check else 'was updated'}.")
        if not check:
            with atomic_output(ROOT / name, force=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
