"""Plots with matplotlib, which the bench extra alone brings: load levels, and quantisations by size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_phi3.bench import BenchError
from edge_phi3.bench.load import Summary
from edge_phi3.bench.quants import Measurement, mean_divergence, on_front
from edge_phi3.files import atomic_output

_MEGABYTE = 1e6
_LATENCIES = (("latency", "latency"), ("first_token", "time to first token"))
_SPEEDS = (("prompt_per_second", "prompt tokens per second"), ("generated_per_second", "generated tokens per second"))


def plot_sweep(name: str, levels: Sequence[Summary], path: Path) -> None:
    """Draw throughput against latency: medians and 95th percentiles, with a labelled point for each level.

    The ending of `path` says the format; `BenchError` where matplotlib is not installed, or does not know it.
    """
    with _figure(path, (10, 4.5), len(_LATENCIES)) as panels:
        for axes, (quantity, label) in zip(panels, _LATENCIES, strict=True):
            points = [(level, times) for level in levels if (times := getattr(level, quantity)) is not None]
            rates = [level.tokens_per_second for level, _ in points]
            medians, tails = ([getattr(times, part) * 1e3 for _, times in points] for part in ("p50", "p95"))
            axes.plot(rates, medians, "o-", color="tab:blue", label=f"{name}, median")
            axes.plot(rates, tails, ".:", color="tab:blue", label=f"{name}, 95th percentile")
            for (level, _), *point in zip(points, rates, medians, strict=True):
                load = f"{level.clients}" if level.rate is None else f"{level.rate:g}/s"
                axes.annotate(load, point, textcoords="offset points", xytext=(4, 5))
            axes.set(xlabel="generated tokens per second", ylabel=f"{label} (ms)")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
        panels[0].legend()


def plot_quality(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw the mean divergence from the reference against the file's size, with the Pareto front; as `plot_sweep`.

    The reference, which diverges by nothing, is a line at its size, and types that are no smaller than it are left out.
    """
    others = [item for item in measurements if item.quality.divergence is not None]
    if not others:
        raise BenchError("There is only the reference: give a --type to compare it with.")
    best = {item.type for item, on in zip(measurements, on_front(measurements), strict=True) if on}
    largest = max((item.bytes for item in measurements if item.reference), default=0)
    others = [item for item in others if item.bytes < largest] or others
    # A divergence of 0 has no place on a logarithmic axis; rounding can even make it negative.
    floor = min((value for item in others if (value := mean_divergence(item)) > 0), default=1e-9)
    points = {item.type: (item.bytes / _MEGABYTE, max(mean_divergence(item), floor)) for item in others}
    with _figure(path, (8.5, 5.5), 1) as (axes,):
        if front := sorted(point for name, point in points.items() if name in best):
            axes.step(*zip(*front, strict=True), where="post", color="tab:green", alpha=0.5, label="Pareto front")
        for name, point in points.items():
            on = name in best
            axes.plot(*point, "o", color="tab:green" if on else "tab:gray", alpha=1 if on else 0.6)
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
        _size_axis(axes)
        axes.set(yscale="log", ylabel="mean KL divergence from the reference (nats)")
        axes.margins(x=0.1)
        axes.legend()


def plot_speed(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw prompt and generation speed against the file's size, a point for each type; as `plot_quality`."""
    with _figure(path, (11, 4.5), len(_SPEEDS)) as panels:
        for axes, (quantity, label) in zip(panels, _SPEEDS, strict=True):
            for item in measurements:
                point = item.bytes / _MEGABYTE, getattr(item.speed, quantity)
                axes.plot(*point, "o", color="tab:blue" if item.reference else "tab:orange")
                axes.annotate(item.type, point, textcoords="offset points", xytext=(5, 3), fontsize=6)
            _size_axis(axes)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)


def _size_axis(axes: Any) -> None:
    axes.set(xscale="log", xlabel="file size (MB)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")


@contextmanager
def _figure(path: Path, size: tuple[float, float], panels: int) -> Iterator[list[Any]]:
    """Yield matplotlib's ``Axes`` of panels side by side; the block's end writes the same bytes for the same figure."""
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - the bench extra alone has it
        from matplotlib.figure import Figure  # noqa: PLC0415 - the bench extra alone has it
    except ImportError:
        raise BenchError("Plots need matplotlib: pip install 'edge-phi3[bench]'.") from None
    figure = Figure(figsize=size, layout="constrained")
    kind, known = path.suffix.removeprefix(".").lower(), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise BenchError(f"{path.name}: matplotlib writes {', '.join(sorted(known))}.")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.grid(alpha=0.3)
    yield axes
    with rc_context({"svg.hashsalt": "edge-phi3"}), atomic_output(path, force=True) as temporary:
        figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
