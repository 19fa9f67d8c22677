"""Plots of quantisations: quality against size, and speed against size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.figure import format_of, open_figure
from edge_phi3.bench.quant_report import Measurement, mean_divergence, on_front
from edge_phi3.files import atomic_output

_MEGABYTE = 1e6
_SPEEDS = (("prompt_per_second", "prompt tokens per second"), ("generated_per_second", "generated tokens per second"))


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
    figure, (axes,) = open_figure(path, (8.5, 5.5), 1)
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
    _save(figure, path, measurements)


def plot_speed(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw prompt and generation speed against the file's size, a point for each type.

    Args:
        measurements: of one model.
        path: as in `plot_quality`.

    Raises:
        BenchError: matplotlib is not installed or does not know the format.
    """
    figure, panels = open_figure(path, (11, 4.5), len(_SPEEDS))
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
    _save(figure, path, measurements)


def digest_of(measurements: Sequence[Measurement]) -> str:
    """Give the digest of drawn figures that a picture carries in its metadata, so that a stale one can be told."""
    return hashlib.sha256(msgspec.json.encode(list(measurements))).hexdigest()


def _plain_ticks(axes: Any, sizes: Sequence[float]) -> None:
    """Write sizes on a logarithmic axis as plain numbers, each a quarter or so above the one before."""
    count = max(2, round(math.log(max(sizes) / min(sizes)) / math.log(1.35)) + 1) if max(sizes) > min(sizes) else 1
    step = (max(sizes) / min(sizes)) ** (1 / max(1, count - 1))
    ticks = [min(sizes) * step**index for index in range(count)]
    axes.set_xticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()


def _save(figure: Any, path: Path, measurements: Sequence[Measurement]) -> None:
    from matplotlib import rc_context  # noqa: PLC0415 - the bench extra alone has it

    form = format_of(path)
    key = "Keywords" if form in {"svg", "pdf"} else "Comment"
    metadata: dict[str, Any] = {key: digest_of(measurements)} if form in {"svg", "pdf", "png"} else {}
    if form == "svg":
        metadata["Date"] = None
    # The same figures give the same bytes: no date, no random ids.
    with rc_context({"svg.hashsalt": "edge-phi3"}), atomic_output(path, force=True) as temporary:
        figure.savefig(temporary, format=form, metadata=metadata or None)
