"""Pictures with matplotlib, which the bench extra alone brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_phi3.bench.errors import BenchError


def open_figure(path: Path, size: tuple[float, float], panels: int) -> tuple[Any, list[Any]]:
    """Give a figure with panels side by side.

    Args:
        path: where the picture will go; its ending says the format (svg, png, pdf).
        size: width and height in inches.
        panels: how many.

    Returns:
        matplotlib's ``Figure``, and its ``Axes`` from left to right, each with a faint grid.

    Raises:
        BenchError: matplotlib is not installed, or does not know the format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - the bench extra alone has it
        from matplotlib.figure import Figure  # noqa: PLC0415 - the bench extra alone has it
    except ImportError:
        raise BenchError("Plots need matplotlib: pip install 'edge-phi3[bench]'.") from None
    figure = Figure(figsize=size, layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if format_of(path) not in known:
        raise BenchError(f"{path.name}: matplotlib writes {', '.join(sorted(known))}.")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes


def format_of(path: Path) -> str:
    """Give a picture's format, as matplotlib names it."""
    return path.suffix.removeprefix(".").lower()
