"""How reports are written: for programs as JSON, for spreadsheets as CSV; whole or not at all."""

from __future__ import annotations

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
