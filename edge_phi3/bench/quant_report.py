"""The figures of several quantisations of one model: as JSON, as CSV, and as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.filesize import decimal
from rich.table import Table

from edge_phi3.bench.quality import Divergence
from edge_phi3.bench.quant_worker import Figures
from edge_phi3.bench.report_files import columns

FORMAT = 1


class Measurement(Figures, frozen=True, tag=False):
    """One type's figures, or those of the reference, with which the others are compared.

    Attributes:
        made_from: a digest of all that the figures depend on, the machine's processor included.
        imatrix: whether an importance matrix guided the quantiser.
        bytes: size of the file.
        quantize_seconds: how long making it took; None for the reference.
    """

    # Not keyword-only, unlike those of `Figures`: so they come first in JSON and CSV.
    type: str
    made_from: str
    reference: bool
    imatrix: bool
    bytes: int
    quantize_seconds: float | None


class QuantReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `edge-phi3 bench quants` found: the reference's figures first, then the others from large to small.

    `text` is the name of what was evaluated, `ctx_size` the tokens of a chunk, `command` how it was measured; `threads`
    is None for the physical cores.
    """

    format: int = FORMAT
    model: str
    text: str
    text_sha256: str
    ctx_size: int
    threads: int | None
    command: str
    measurements: list[Measurement]

    def rows(self) -> list[dict[str, Any]]:
        """Return the columns of each type, for a CSV file."""
        return [
            {
                name: value
                for figures in (item, item.speed, item.quality, item.machine)
                for name, value in columns(figures, divergence=Divergence).items()
                if name not in {"made_from", "speed", "turns", "quality", "machine"}
            }
            for item in self.measurements
        ]


def read_report(path: Path) -> QuantReport | None:
    """Return a report that was written before; None when there is none, or it is damaged or of another format."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=QuantReport)
    except (OSError, msgspec.MsgspecError):
        return None
    return report if report.format == FORMAT else None


def on_front(measurements: Sequence[Measurement]) -> list[bool]:
    """Return for each type whether it is on the Pareto front: no other is as small and as close, and better in one."""
    points = [(measurement.bytes, mean_divergence(measurement)) for measurement in measurements]
    return [
        not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        for point in points
    ]


def mean_divergence(measurement: Measurement) -> float:
    """Return the mean divergence from the reference in nats, 0 for the reference itself."""
    divergence = measurement.quality.divergence
    return 0.0 if divergence is None else divergence.mean


def table(report: QuantReport) -> Table:
    """Return the figures as a table; a star marks the Pareto front of size and divergence."""
    result = Table(box=None, padding=(0, 1))
    result.add_column("type", no_wrap=True)
    quality, speed = ("perplexity", "KL mean", "KL 99 %", "same top"), ("prompt/s", "gen/s", "TTFT")
    for heading in ("size", "bpw", *quality, *speed, "memory", "GPU", "load"):
        result.add_column(heading, justify="right", no_wrap=True)
    for measurement, best in zip(report.measurements, on_front(report.measurements), strict=True):
        found, divergence, timed = measurement.quality, measurement.quality.divergence, measurement.speed
        result.add_row(
            f"{measurement.type}{' *' if best else ''}",
            decimal(measurement.bytes),
            f"{measurement.bits_per_weight:.2f}",
            f"{found.perplexity:.4g} ±{found.perplexity_error:.2g}",
            "-" if divergence is None else f"{divergence.mean:.4g}",
            "-" if divergence is None else f"{divergence.p99:.3g}",
            "-" if divergence is None else f"{100 * divergence.same_top:.2f} %",
            f"{timed.prompt_per_second:.4g}",
            f"{timed.generated_per_second:.4g}",
            f"{timed.first_token * 1e3:.3g} ms",
            decimal(measurement.memory_peak),
            "-" if measurement.gpu_memory is None else decimal(measurement.gpu_memory),
            f"{measurement.load_seconds:.2f} s",
        )
    return result
