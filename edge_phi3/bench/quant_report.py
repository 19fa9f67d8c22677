"""The figures of several quantisations of one model: as JSON, as CSV, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.filesize import decimal
from rich.table import Table

from edge_phi3.bench.quality import Divergence
from edge_phi3.bench.quant_worker import Figures
from edge_phi3.bench.written import write_csv, write_json

FORMAT = 1


class Measurement(Figures, frozen=True):
    """One type's figures.

    Attributes:
        type: the quantisation type, or the reference's own.
        made_from: a digest of all that the figures depend on, the machine's processor included.
        reference: whether the others are compared with this one.
        imatrix: whether an importance matrix guided the quantiser.
        bytes: size of the file.
        bits_per_weight: of all tensors together, metadata not counted.
        quantize_seconds: how long making it took; None for the reference.
    """

    # Not keyword-only, unlike those of `Figures`: so they come first in JSON, CSV and the digests of pictures.
    type: str
    made_from: str
    reference: bool
    imatrix: bool
    bytes: int
    bits_per_weight: float
    quantize_seconds: float | None


class QuantReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `edge-phi3 bench quants` found.

    Attributes:
        format: version of this structure.
        model: name of the measured model.
        text: name of the text that was evaluated.
        text_sha256: of its bytes.
        ctx_size: tokens of a chunk.
        threads: CPU threads asked for; None for the physical cores.
        command: how it was measured.
        measurements: the reference first, then the others from large to small.
    """

    format: int = FORMAT
    model: str
    text: str
    text_sha256: str
    ctx_size: int
    threads: int | None
    command: str
    measurements: list[Measurement]

    def write_json(self, path: Path) -> None:
        """Write everything, replacing the file."""
        write_json(path, self)

    def write_csv(self, path: Path) -> None:
        """Write one row for each type, replacing the file; nested figures become columns such as ``divergence_p99``."""
        write_csv(path, [_flat(measurement) for measurement in self.measurements])


def read_report(path: Path) -> QuantReport | None:
    """Return a report that was written before; None when there is none, or it is damaged or of another format."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=QuantReport)
    except (OSError, msgspec.MsgspecError):
        return None
    return report if report.format == FORMAT else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each point whether no other beats it: none is as small in both coordinates and smaller in one."""
    return [
        not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        for point in points
    ]


def on_front(measurements: Sequence[Measurement]) -> list[bool]:
    """Return for each type whether it lies on the Pareto front of file size and mean divergence."""
    return pareto_front([(measurement.bytes, mean_divergence(measurement)) for measurement in measurements])


def mean_divergence(measurement: Measurement) -> float:
    """Return the mean divergence from the reference in nats, 0 for the reference itself."""
    divergence = measurement.quality.divergence
    return 0.0 if divergence is None else divergence.mean


def table(report: QuantReport) -> Table:
    """Return the figures as a table; a star marks the Pareto front of size and divergence."""
    result = Table(box=None, padding=(0, 1))
    result.add_column("type", no_wrap=True)
    for heading in ("size", "bpw", "perplexity", "KL mean", "KL 99 %", "same top"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("prompt/s", "gen/s", "TTFT", "memory", "GPU", "load"):
        result.add_column(heading, justify="right", no_wrap=True)
    for measurement, best in zip(report.measurements, on_front(report.measurements), strict=True):
        quality, speed = measurement.quality, measurement.speed
        result.add_row(
            f"{measurement.type}{' *' if best else ''}",
            decimal(measurement.bytes),
            f"{measurement.bits_per_weight:.2f}",
            f"{quality.perplexity:.4g} ±{quality.perplexity_error:.2g}",
            *_divergence_cells(quality.divergence),
            f"{speed.prompt_per_second:.4g}",
            f"{speed.generated_per_second:.4g}",
            f"{speed.first_token * 1e3:.3g} ms",
            decimal(measurement.memory_peak),
            "-" if measurement.gpu_memory is None else decimal(measurement.gpu_memory),
            f"{measurement.load_seconds:.2f} s",
        )
    return result


def _divergence_cells(divergence: Divergence | None) -> tuple[str, str, str]:
    if divergence is None:
        return "-", "-", "-"
    return f"{divergence.mean:.4g}", f"{divergence.p99:.3g}", f"{100 * divergence.same_top:.2f} %"


def _flat(measurement: Measurement) -> dict[str, Any]:
    fields = {name: getattr(measurement, name) for name in measurement.__struct_fields__}
    speed, quality, machine = fields.pop("speed"), fields.pop("quality"), fields.pop("machine")
    del fields["made_from"]
    for part in ("prompt_tokens", "generated_tokens", "prompt_per_second", "generated_per_second", "first_token"):
        fields[part] = getattr(speed, part)
    for part in ("chunks", "positions", "perplexity", "perplexity_error"):
        fields[part] = getattr(quality, part)
    for part in Divergence.__struct_fields__:
        fields[f"divergence_{part}"] = None if quality.divergence is None else getattr(quality.divergence, part)
    return fields | {"date": machine.date, "cpu": machine.cpu, "cores": machine.cores}
