"""Measure several quantisations of one model: how large, how good, how fast.

All is compared with one reference, the F16 model. What takes long is kept in the output folder and used again: files
are made by `edge_phi3.conversion.journey`, and each figure carries a digest of all that it depends on.
"""

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import msgspec
from rich.filesize import decimal
from rich.table import Table

from edge_phi3.bench import BenchError
from edge_phi3.bench.machine import Machine, columns, write_csv, write_json
from edge_phi3.bench.options import FILE, Option
from edge_phi3.bench.quality import Divergence
from edge_phi3.bench.quant_worker import Conditions, Figures, Job, measure
from edge_phi3.conversion import tool_versions
from edge_phi3.conversion.journey import LOCK_NAME, Journey, Stop, choose_types
from edge_phi3.conversion.json_files import MAX_BYTES
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES, QuantizationType
from edge_phi3.files import locked, read_bounded
from edge_phi3.gguf_file import GgufError, read_gguf
from edge_phi3.progress import ProgressReporter, SilentProgress

DEFAULT_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K", "IQ2_M")
"""One good type for each step in size."""

REPORT_NAME, FORMAT = "quants.json", 1


def evaluation_text() -> str:
    """Return the packaged evaluation text: conversations in Phi-3's chat format, none of them calibration text."""
    return files("edge_phi3.bench").joinpath("evaluation.txt").read_text("utf-8")


class QuantBench(Conditions, frozen=True):
    """What to measure, and how: options of `edge-phi3 bench quants`.

    `model` is a GGUF in F16, BF16 or F32, or a checkpoint, which is converted to F16; `command` goes into the report.
    """

    model: Path
    output_dir: Annotated[Path, Option("Folder for results, plots, and what the next run can use again.", FILE)] = Path(
        "bench-quants"
    )
    types: Annotated[
        Sequence[str],
        Option(
            f"A quantisation type, or all; repeatable. [default: {', '.join(DEFAULT_TYPES)}]",
            metavar="TYPE",
            flag="--type",
        ),
    ] = ()
    text: Annotated[Path | None, Option("Text to evaluate, in UTF-8. [default: the packaged text]", FILE, "FILE")] = (
        None
    )
    imatrix: Annotated[
        str,
        Option(
            "Importance matrix for types of fewer than 8 bits; auto collects one from the packaged calibration text.",
            metavar="auto|FILE|none",
        ),
    ] = "auto"
    keep_models: Annotated[bool, Option("Keep the quantised files in the output folder.")] = False
    again: Annotated[bool, Option("Measure again what the output folder has results of.")] = False
    command: str = ""


class Measurement(Figures, frozen=True, tag=False):
    """One type's figures, or those of the reference, with which the others are compared.

    `made_from` digests all that they depend on, the machine's processor included; `imatrix` is whether one guided the
    quantiser, `bytes` the file's size, `quantize_seconds` how long making it took, None for the reference.
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

    `text` names what was evaluated, `command` tells how it was measured; `threads` is None for the physical cores.
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


def run(bench: QuantBench, *, progress: ProgressReporter | None = None) -> QuantReport:
    """Measure each type and write ``quants.json`` and ``quants.csv``, after each type anew.

    Return the report of the requested types, and of those that the folder holds from earlier runs with the same inputs.

    Raises:
        BenchError: the model or the text cannot be measured.
        ConversionError, ImatrixError, QuantizeError, UnknownQuantizationError: a step before it cannot be done.
    """
    every = [kind.name for kind in QUANTIZATION_TYPES.values() if not kind.special]
    names = [name for given in bench.types or DEFAULT_TYPES for name in (every if given.lower() == "all" else [given])]
    types = choose_types(names, bench.imatrix)
    with locked(bench.output_dir / LOCK_NAME):
        return _Run(bench, progress or SilentProgress()).run(types)


class _Run:
    def __init__(self, bench: QuantBench, progress: ProgressReporter) -> None:
        self._bench, self._progress, self._folder = bench, progress, bench.output_dir
        self._name = bench.model.resolve().name.removesuffix(".gguf")
        try:
            self._text = evaluation_text() if bench.text is None else _read(bench.text, "text").decode()
        except UnicodeDecodeError as error:
            raise BenchError(f"The text {bench.text} is not UTF-8: {error.reason}.") from error
        self._text_sha256 = hashlib.sha256(self._text.encode()).hexdigest()
        self._conditions = {name: getattr(bench, name) for name in Conditions.__struct_fields__}
        self._journey = Journey(
            self._folder, self._name, progress, threads=bench.threads, n_gpu_layers=bench.n_gpu_layers
        )
        self._found: dict[str, Measurement] = {}

    def run(self, types: Sequence[QuantizationType]) -> QuantReport:
        bench, base = self._bench, self._base()
        types = [kind for kind in types if kind.name != base.made.type]
        matrix = Path(bench.imatrix) if bench.imatrix not in {"auto", "none"} else None
        # What was measured with a matrix before is known by it, whatever is requested now.
        guides = self._journey.path("imatrix").exists() or any(kind.uses_imatrix for kind in types)
        if bench.imatrix == "auto" and guides:
            matrix = self._journey.collect(base).path
        guide = None if matrix is None else hashlib.sha256(_read(matrix, "importance matrix")).hexdigest()
        here = Machine.here()
        machine = [here.cpu, here.cores, list(tool_versions().values())]

        def key(name: str) -> str:
            guided = name != base.made.type and QUANTIZATION_TYPES[name].uses_imatrix
            inputs = [FORMAT, base.made.seen.sha256, name, guide if guided else None, self._text_sha256]
            return hashlib.sha256(msgspec.json.encode([*inputs, [*self._conditions.values()], machine])).hexdigest()

        logits = self._folder / f"{self._name}-{key(base.made.type)[:12]}.log-probs.npy"
        for other in set(self._folder.glob(f"{self._name}-*.log-probs.npy")) - {logits}:
            other.unlink()
        # What earlier runs measured with the same inputs counts, whether it is requested now or not.
        known, anew = read_report(self._folder / REPORT_NAME), {base.made.type, *(kind.name for kind in types)}
        for item in known.measurements if known else []:
            again = bench.again and item.type in anew
            if item.type in QUANTIZATION_TYPES and item.made_from == key(item.type) and not again:
                self._found[item.type] = item
        if base.made.type not in self._found or not logits.exists():
            self._measure(base, logits, key(base.made.type), reference=True)
        for kind in types:
            if kind.name in self._found:
                self._progress.note(f"{kind.name} is measured already.")
                continue
            stop = self._journey.quantize(base, kind, matrix)
            try:
                self._measure(stop, logits, key(kind.name), guided=matrix is not None and kind.uses_imatrix)
            finally:
                if stop.fresh and not bench.keep_models:
                    stop.path.unlink(missing_ok=True)
        return self._report()

    def _base(self) -> Stop:
        """Return the reference's file, converted when a checkpoint was given."""
        model = self._bench.model
        if not model.is_file():
            if not (model / "config.json").is_file():
                raise BenchError(f"{model} is neither a GGUF file nor a checkpoint folder with a config.json.")
            return self._journey.convert(model, outtype="f16")
        try:
            number = read_gguf(model).values.get("general.file_type")
        except (OSError, GgufError) as error:
            raise BenchError(f"{model} is not a whole GGUF model: {error}.") from error
        names = {kind.ftype: kind.name for kind in QUANTIZATION_TYPES.values()}
        if not isinstance(number, int) or (kind := names.get(number)) is None:
            raise BenchError(f"{model} does not say its file type (general.file_type); convert the checkpoint anew.")
        if kind not in {"F32", "F16", "BF16"}:
            raise BenchError(
                f"{model} is quantised to {kind} already; give the model in F16, BF16 or F32, or its checkpoint."
            )
        return self._journey.begin_with(model, kind)

    def _measure(self, stop: Stop, logits: Path, key: str, *, guided: bool = False, reference: bool = False) -> None:
        """Measure a file, and write the report with it."""
        job = Job(model=stop.path, text=self._text, logits=logits, reference=reference, **self._conditions)
        kind, size = stop.made.type, stop.path.stat().st_size
        with self._progress.step(f"Measuring {kind}", size) as step:
            # The bar counts bytes: as many of the file's as chunks of the text are done.
            figures = measure(
                job,
                lambda now: step.update(size * now.done // now.total, size, f"chunk {now.done} of {now.total}"),
            )
        self._found[kind] = Measurement(
            type=kind,
            made_from=key,
            reference=reference,
            imatrix=guided,
            bytes=size,
            quantize_seconds=None if reference else stop.made.seconds,
            **msgspec.structs.asdict(figures),
        )
        report = self._report()
        write_json(self._folder / REPORT_NAME, report)
        write_csv(self._folder / "quants.csv", report.rows())

    def _report(self) -> QuantReport:
        return QuantReport(
            model=self._name,
            text="edge-phi3 evaluation.txt" if self._bench.text is None else self._bench.text.name,
            text_sha256=self._text_sha256,
            ctx_size=self._bench.ctx_size,
            threads=self._bench.threads,
            command=self._bench.command,
            measurements=sorted(self._found.values(), key=lambda item: (not item.reference, -item.bytes)),
        )


def _read(path: Path, what: str) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES, regular=False)
    except OSError as error:
        raise BenchError(f"The {what} {path} cannot be read: {error.strerror}.") from error
