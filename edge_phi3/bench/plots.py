"""Plots of load levels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_phi3.bench.figure import format_of, open_figure
from edge_phi3.bench.summary import Distribution, Summary
from edge_phi3.files import atomic_output

_PANELS = (("latency", "latency"), ("first_token", "time to first token"))


def plot_sweep(series: dict[str, Sequence[Summary]], path: Path) -> None:
    """Draw throughput against latency, one line for each series and one labelled point for each level.

    Args:
        series: levels by the name of what was measured.
        path: the picture, replaced when it exists; its ending says the format (svg, png, pdf).

    Raises:
        BenchError: matplotlib is not installed, or does not know the format.
    """
    figure, panels = open_figure(path, (10, 4.5), len(_PANELS))
    for panel, (quantity, label) in zip(panels, _PANELS, strict=True):
        for name, levels in series.items():
            points = [(level, times) for level in levels if (times := _times(level, quantity)) is not None]
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
    with atomic_output(path, force=True) as temporary:
        figure.savefig(temporary, format=format_of(path))


def _times(level: Summary, quantity: str) -> Distribution | None:
    times: Distribution | None = getattr(level, quantity)
    return times
