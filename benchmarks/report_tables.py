"""Markdown for the report: tables, figures, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence

from edge_phi3.bench.machine import Machine


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """Give the lines of a table: the first `words` columns to the left, the others, figures, to the right."""
    marks = ["---" if index < words else "---:" for index in range(len(heads))]
    return [f"| {' | '.join(line)} |" for line in (heads, marks, *rows)]


def number(value: float) -> str:
    """Give a figure with three digits, and no exponent unless it is tiny."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def machine_line(machine: Machine, command: str) -> str:
    """Say where, when, with which versions and by which command figures were measured."""
    load = "" if machine.load is None else f", at a load of {machine.load:g} before"
    return (
        f"{machine.date[:10]}; {machine.cpu}, {machine.cores} cores, {machine.memory / 2**30:.0f} GiB{load};"
        f" {machine.system}, Python {machine.python}, edge-phi3 {machine.edge_phi3}, llama-cpp-python"
        f" {machine.llama_cpp}.\nMade by `{command}`."
    )
