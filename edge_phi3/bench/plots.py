"""Plots with matplotlib, which the bench extra alone brings: load levels, and quantisations by size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.quant_report import Measurement, mean_divergence, on_front
from edge_phi3.bench.summary import Summary
from edge_phi3.files import atomic_output

_MEGABYTE = 1e6
_LATENCIES = (("latency", "latency"), ("first_token", "time to first token"))
_SPEEDS = (("prompt_per_second", "prompt tokens per second"), ("generated_per_second", "generated tokens per second"))


def plot_sweep(series: dict[str, Sequence[Summary]], path: Path) -> None:
    """Draw throughput against latency, one line for each series and one labelled point for each level.

    Args:
        series: levels by the name of what was measured.
        path: the picture, replaced when it exists; its ending says the format (svg, png, pdf).

    Raises:
        BenchError: matplotlib is not installed, or does not know the format.
    """
    figure, panels = _open_figure(path, (10, 4.5), len(_LATENCIES))
    for panel, (quantity, label) in zip(panels, _LATENCIES, strict=True):
        for name, levels in series.items():
            points = [(level, times) for level in levels if (times := getattr(level, quantity)) is not None]
            rates = [level.tokens_per_second for level, _ in points]
            (line,) = panel.plot(rates, [times.p50 * 1e3 for _, times in points], marker="o", label=f"{name}, median")
            panel.plot(
                rates,
                [times.p95 * 1e3 for _, times in points],
                marker=".",
                linestyle=":",
                color=line.get_color(),
                label=f"{name}, 95th percentile",
            )
            for level, times in points:
                load = f"{level.clients}" if level.rate is None else f"{level.rate:g}/s"
                panel.annotate(
                    load, (level.tokens_per_second, times.p50 * 1e3), textcoords="offset points", xytext=(4, 5)
                )
        panel.set_xlabel("generated tokens per second")
        panel.set_ylabel(f"{label} (ms)")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    panels[0].legend()
    _save(figure, path)


def plot_quality(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw the mean divergence from the reference against the file's size, with the Pareto front.

    Args:
        measurements: of one model; the reference, which diverges by nothing, is a line at its size, and types that are
            no smaller than it are left out.
        path: the picture, replaced when it exists; its ending says the format (svg, png, pdf).

    Raises:
        BenchError: matplotlib is not installed or does not know the format, or there is nothing to draw.
    """
    others = [item for item in measurements if item.quality.divergence is not None]
    if not others:
        raise BenchError("There is only the reference: give a --type to compare it with.")
    best = {item.type for item, on in zip(measurements, on_front(measurements), strict=True) if on}
    largest = max((item.bytes for item in measurements if item.reference), default=0)
    others = [item for item in others if item.bytes < largest] or others
    figure, (axes,) = _open_figure(path, (8.5, 5.5), 1)
    # A divergence of 0 has no place on a logarithmic axis; rounding can even make it negative.
    floor = min((value for item in others if (value := mean_divergence(item)) > 0), default=1e-9)
    points = {item.type: (item.bytes / _MEGABYTE, max(mean_divergence(item), floor)) for item in others}
    front = sorted(point for name, point in points.items() if name in best)
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="tab:green", alpha=0.5, label="Pareto front")
    for name, point in points.items():
        on = name in best
        axes.plot(*([value] for value in point), "o", color="tab:green" if on else "tab:gray", alpha=1 if on else 0.6)
        # Below the front and to its left there is nothing to cover.
        placed: dict[str, Any] = (
            {"xytext": (-2, -3), "ha": "right", "va": "top", "rotation": 35} if on else {"xytext": (5, 3)}
        )
        colour = "black" if on else "gray"
        axes.annotate(name, point, textcoords="offset points", fontsize=7, color=colour, **placed)
    for item in measurements:
        if item.reference:
            label = f"{item.type}, the reference"
            axes.axvline(item.bytes / _MEGABYTE, color="tab:blue", linestyle=":", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes, [point[0] for point in points.values()] + [largest / _MEGABYTE or 1])
    axes.set_xlabel("file size (MB)")
    axes.set_ylabel("mean KL divergence from the reference (nats)")
    axes.margins(x=0.1)
    axes.legend()
    _save(figure, path, digest_of(measurements))


def plot_speed(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw prompt and generation speed against the file's size, a point for each type.

    Args:
        measurements: of one model.
        path: as in `plot_quality`.

    Raises:
        BenchError: matplotlib is not installed or does not know the format.
    """
    figure, panels = _open_figure(path, (11, 4.5), len(_SPEEDS))
    for axes, (quantity, label) in zip(panels, _SPEEDS, strict=True):
        for item in measurements:
            point = item.bytes / _MEGABYTE, getattr(item.speed, quantity)
            axes.plot(*([value] for value in point), "o", color="tab:blue" if item.reference else "tab:orange")
            axes.annotate(item.type, point, textcoords="offset points", xytext=(5, 3), fontsize=6)
        axes.set_xscale("log")
        _plain_ticks(axes, [item.bytes / _MEGABYTE for item in measurements])
        axes.set_xlabel("file size (MB)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    _save(figure, path, digest_of(measurements))


def digest_of(measurements: Sequence[Measurement]) -> str:
    """Return the digest of drawn figures that a picture carries in its metadata, so that a stale one can be told."""
    return hashlib.sha256(msgspec.json.encode(list(measurements))).hexdigest()


def _plain_ticks(axes: Any, sizes: Sequence[float]) -> None:
    """Write sizes on a logarithmic axis as plain numbers, each a quarter or so above the one before."""
    count = max(2, round(math.log(max(sizes) / min(sizes)) / math.log(1.35)) + 1) if max(sizes) > min(sizes) else 1
    step = (max(sizes) / min(sizes)) ** (1 / max(1, count - 1))
    ticks = [min(sizes) * step**index for index in range(count)]
    axes.set_xticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()


def _open_figure(path: Path, size: tuple[float, float], panels: int) -> tuple[Any, list[Any]]:
    """Return a figure with panels side by side.

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
    if _format_of(path) not in known:
        raise BenchError(f"{path.name}: matplotlib writes {', '.join(sorted(known))}.")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes


def _format_of(path: Path) -> str:
    """Return a picture's format, as matplotlib names it."""
    return path.suffix.removeprefix(".").lower()


def _save(figure: Any, path: Path, keyword: str | None = None) -> None:
    """Write a picture: the same figures give the same bytes, since there is no date and no random id in it."""
    from matplotlib import rc_context  # noqa: PLC0415 - the bench extra alone has it

    form = _format_of(path)
    key = {"svg": "Keywords", "pdf": "Keywords", "png": "Comment"}.get(form)
    metadata: dict[str, Any] = {key: keyword} if key and keyword else {}
    if form == "svg":
        metadata["Date"] = None
    with rc_context({"svg.hashsalt": "edge-phi3"}), atomic_output(path, force=True) as temporary:
        figure.savefig(temporary, format=form, metadata=metadata or None)
