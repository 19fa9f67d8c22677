"""The reference of generation parameters, for docs/parameters.md, made from their table."""

import json

from edge_phi3.generation.parameters import OPENAI_PARAMETERS, PARAMETERS, groups
from edge_phi3.generation.refused import REFUSED
from edge_phi3.generation.values import Parameter, Source


def markdown() -> str:
    """Return the reference: a table for each group, and one of what is refused."""
    parameters = PARAMETERS | OPENAI_PARAMETERS
    sections = []
    for group, names in groups(parameters).items():
        rows = [_row(name, parameters[name]) for name in names]
        sections.append(_table(f"### {group}", ["name", "type", "absent", "null", "meaning"], rows))
    reasons: dict[str, list[str]] = {}
    for name, refused in REFUSED.items():
        harmless = f" ({_code(refused.harmless[0])})" if refused.harmless else ""
        reasons.setdefault(refused.reason, []).append(f"`{name}`{harmless}")
    sections.append(
        _table("### Refused", ["name", "why"], [[", ".join(names), reason] for reason, names in reasons.items()])
    )
    return "\n\n".join(sections)


def _table(heading: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join([heading, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def _row(name: str, parameter: Parameter) -> list[str]:
    meaning = f"{parameter.meaning} {parameter.computed}".strip()
    type_ = parameter.value.kind.allowed.removeprefix("a ").removeprefix("an ")
    return [f"`{name}`", type_, _shown(parameter.absent), _shown(parameter.null), meaning]


def _shown(value: object) -> str:
    if isinstance(value, Source):
        return value.value
    if value is None:
        return "not set"
    return "none" if value == () else _code(value)


def _code(value: object) -> str:
    return f"`{json.dumps(value)}`"
