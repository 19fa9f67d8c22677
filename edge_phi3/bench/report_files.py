"""How reports are written: for programs as JSON, for spreadsheets as CSV; whole or not at all."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_phi3.files import atomic_output


def write_json(path: Path, report: msgspec.Struct) -> None:
    """Write a report, replacing the file."""
    with atomic_output(path, force=True) as temporary:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same columns, the names of the columns first, replacing the file."""
    with atomic_output(path, force=True) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def columns(figures: msgspec.Struct, **nested: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the columns of some figures; those of a `nested` struct, or None, become columns like ``latency_p95``."""
    row: dict[str, Any] = {}
    for name in figures.__struct_fields__:
        value = getattr(figures, name)
        parts = nested[name].__struct_fields__ if name in nested else ()
        row |= {f"{name}_{part}": getattr(value, part, None) for part in parts} if parts else {name: value}
    return row
