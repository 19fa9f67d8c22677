"""Entries of ``config.json``, checked: a wrong one is told with its name and what is allowed."""

from __future__ import annotations

import math
from typing import Any

from edge_phi3.conversion.errors import CheckpointError


def is_number(value: object) -> bool:
    """Tell whether a value of a JSON file is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def integer(
    config: dict[str, Any], name: str, default: int | None = None, *, minimum: int = 1, maximum: int = (1 << 31) - 1
) -> int:
    """Give a whole number between two bounds.

    Raises:
        CheckpointError: the entry is something else.
    """
    value = config.get(name, default)
    if type(value) is not int or not minimum <= value <= maximum:
        allowed = f"a whole number from {minimum:,} to {maximum:,}"
        raise CheckpointError(f"config.json: {name} is {shown(value)}; {allowed} is needed.")
    return value


def number(config: dict[str, Any], name: str, default: float | None = None) -> float:
    """Give a positive number.

    Raises:
        CheckpointError: the entry is something else.
    """
    value: Any = config.get(name, default)
    if not is_number(value) or value <= 0:
        raise CheckpointError(f"config.json: {name} is {shown(value)}; a positive number is needed.")
    return float(value)


def shown(value: object) -> str:
    """Give a value as a sentence names it: in Python's spelling, and not too long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:80]}..."
