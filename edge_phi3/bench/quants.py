"""Measure several quantisations of one model: how large, how good, how fast.

All is compared with one reference, the F16 model. What takes long is kept in the output folder and used again: files
are made by `edge_phi3.conversion.journey`, and each figure carries a digest of all that it depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import gguf
import msgspec

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.logits_file import LogitsFile
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.quant_report import FORMAT, Measurement, QuantReport, read_report
from edge_phi3.bench.quant_worker import Conditions, Job, Measured, measure
from edge_phi3.conversion import tool_versions
from edge_phi3.conversion.journey import LOCK_NAME, Journey, Stop, choose_types
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES, QuantizationType
from edge_phi3.files import locked, sha256_of
from edge_phi3.progress import ProgressReporter, SilentProgress

EVALUATION_NAME = "edge-phi3 evaluation.txt"
"""What reports call the packaged text."""

DEFAULT_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K", "IQ2_M")
"""One good type for each step in size."""

REPORT_NAME = "quants.json"
TABLE_NAME = "quants.csv"

_PLAIN_TYPES = {"F32", "F16", "BF16"}


def evaluation_text() -> str:
    """Return the packaged evaluation text: conversations in Phi-3's chat format, none of them calibration text."""
    return files("edge_phi3.bench").joinpath("evaluation.txt").read_text("utf-8")


class QuantBench(Conditions, frozen=True):
    """What to measure, and how.

    Attributes:
        model: a GGUF in F16, BF16 or F32, or a checkpoint, which is converted to F16.
        output_dir: where results and what is kept for the next time go.
        types: names of quantisation types; ``all`` stands for all but the special ones.
        text: a file to evaluate, UTF-8; None takes the packaged text.
        imatrix: ``auto`` collects an importance matrix with the packaged calibration text when a type of fewer than
            8 bits is wanted, ``none`` does without, anything else is the path of one made before.
        keep_models: keep the quantised files.
        again: measure anew what was measured already.
        command: how this was asked for, recorded in the report.
    """

    model: Path
    output_dir: Path
    types: Sequence[str] = DEFAULT_TYPES
    text: Path | None = None
    imatrix: str = "auto"
    keep_models: bool = False
    again: bool = False
    command: str = ""


def run(
    bench: QuantBench,
    *,
    progress: ProgressReporter | None = None,
    measured: Callable[[QuantReport], None] = lambda _: None,
) -> QuantReport:
    """Measure each type and write ``quants.json`` and ``quants.csv``, after each type anew.

    Args:
        bench: what to measure.
        progress: told of each step.
        measured: told of the report so far after each measurement.

    Returns:
        The report of the types asked for, and of those that the folder holds from earlier runs with the same inputs.

    Raises:
        BenchError: the model or the text cannot be measured.
        ConversionError, ImatrixError, QuantizeError, UnknownQuantizationError: a step before it cannot be done.
    """
    every = [kind.name for kind in QUANTIZATION_TYPES.values() if not kind.special]
    names = [name for given in bench.types for name in (every if given.lower() == "all" else [given])]
    types = choose_types(names, bench.imatrix)
    with locked(bench.output_dir / LOCK_NAME):
        return _Run(bench, progress or SilentProgress(), measured).run(types)


class _Run:
    def __init__(self, bench: QuantBench, progress: ProgressReporter, measured: Callable[[QuantReport], None]) -> None:
        self._bench, self._progress, self._measured = bench, progress, measured
        self._folder = bench.output_dir
        self._name = bench.model.resolve().name.removesuffix(".gguf")
        self._text = evaluation_text() if bench.text is None else _read(bench.text)
        self._machine = Machine.here()
        self._journey = Journey(
            self._folder, self._name, progress, threads=bench.threads, n_gpu_layers=bench.n_gpu_layers
        )
        self._found: dict[str, Measurement] = {}

    def run(self, types: Sequence[QuantizationType]) -> QuantReport:
        base = self._base()
        base_type, digest = base.made.type, base.made.seen.sha256
        types = [kind for kind in types if kind.name != base_type]
        matrix = self._matrix(base, types)
        guide = None if matrix is None else _matrix_digest(matrix)

        def key(name: str) -> str:
            guided = name != base_type and QUANTIZATION_TYPES[name].uses_imatrix
            return self._key(digest, name, guide if guided else None)

        logits = self._folder / f"{self._name}-{key(base_type)[:12]}.logits"
        for other in set(self._folder.glob(f"{self._name}-*.logits")) - {logits}:
            other.unlink()
        self._take_over({kind.name for kind in types} | {base_type}, key)
        if base_type not in self._found or not _whole(logits):
            done = self._measure(base.path, logits, base_type, text=self._text)
            self._add(self._entry(base_type, key(base_type), base.path, done, guided=False, seconds=None))
        for kind in types:
            if kind.name in self._found:
                self._progress.note(f"{kind.name} is measured already.")
                continue
            self._add(self._quantised(base, logits, kind, matrix, key(kind.name)))
        return self._report()

    def _take_over(self, asked: set[str], key: Callable[[str], str]) -> None:
        """Begin with what earlier runs measured with the same inputs, whether it is asked for now or not."""
        known = read_report(self._folder / REPORT_NAME)
        for item in known.measurements if known else []:
            wanted_anew = self._bench.again and item.type in asked
            if item.type in QUANTIZATION_TYPES and item.made_from == key(item.type) and not wanted_anew:
                self._found[item.type] = item

    def _base(self) -> Stop:
        """Return the reference's file, converted when a checkpoint was given."""
        model = self._bench.model
        if model.is_file():
            kind = _type_of(model)
            if kind not in _PLAIN_TYPES:
                raise BenchError(
                    f"{model} is quantised to {kind} already; give the model in F16, BF16 or F32, or its checkpoint."
                )
            return self._journey.begin_with(model, kind)
        if not (model / "config.json").is_file():
            raise BenchError(f"{model} is neither a GGUF file nor a checkpoint folder with a config.json.")
        return self._journey.convert(model, outtype="f16")

    def _matrix(self, base: Stop, types: Sequence[QuantizationType]) -> Path | None:
        chosen = self._bench.imatrix
        if chosen != "auto":
            return None if chosen == "none" else Path(chosen)
        # What was measured with a matrix before is known by it, whatever is asked for now.
        if self._journey.path("imatrix").exists() or any(kind.uses_imatrix for kind in types):
            return self._journey.collect(base).path
        return None

    def _quantised(
        self, base: Stop, logits: Path, kind: QuantizationType, matrix: Path | None, key: str
    ) -> Measurement:
        stop = self._journey.quantize(base, kind, matrix)
        guided = matrix is not None and kind.uses_imatrix
        try:
            done = self._measure(stop.path, logits, kind.name, text=None)
            return self._entry(kind.name, key, stop.path, done, guided=guided, seconds=stop.made.seconds)
        finally:
            if stop.fresh and not self._bench.keep_models:
                stop.path.unlink(missing_ok=True)

    def _measure(self, path: Path, logits: Path, kind: str, *, text: str | None) -> Measured:
        conditions = {name: getattr(self._bench, name) for name in Conditions.__struct_fields__}
        job = Job(model=str(path), logits=str(logits), text=text, **conditions)
        size = path.stat().st_size
        with self._progress.step(f"Measuring {kind}", size) as step:
            # The bar counts bytes: as many of the file's as chunks of the text are done.
            return measure(
                job,
                lambda now: step.update(size * now.done // now.total, size, f"chunk {now.done} of {now.total}"),
            )

    def _entry(
        self, kind: str, key: str, path: Path, done: Measured, *, guided: bool, seconds: float | None
    ) -> Measurement:
        return Measurement(
            type=kind,
            made_from=key,
            reference=seconds is None,
            imatrix=guided,
            bytes=path.stat().st_size,
            quantize_seconds=seconds,
            **msgspec.structs.asdict(done),
        )

    def _add(self, measurement: Measurement) -> None:
        self._found[measurement.type] = measurement
        report = self._report()
        report.write_json(self._folder / REPORT_NAME)
        report.write_csv(self._folder / TABLE_NAME)
        self._measured(report)

    def _key(self, base: str, kind: str, matrix: str | None) -> str:
        bench = self._bench
        inputs = [FORMAT, base, kind, matrix]
        text = [_text_digest(self._text), bench.parse_special, bench.ctx_size, bench.chunks]
        speed = [bench.threads, bench.n_gpu_layers, bench.prompt_tokens, bench.generated_tokens, bench.repetitions]
        machine = [self._machine.cpu, self._machine.cores, list(tool_versions().values())]
        return _digest([inputs, text, speed, machine])

    def _report(self) -> QuantReport:
        ordered = sorted(self._found.values(), key=lambda item: (not item.reference, -item.bytes))
        return QuantReport(
            model=self._name,
            text=EVALUATION_NAME if self._bench.text is None else self._bench.text.name,
            text_sha256=_text_digest(self._text),
            ctx_size=self._bench.ctx_size,
            threads=self._bench.threads,
            command=self._bench.command,
            measurements=ordered,
        )


def _type_of(path: Path) -> str:
    """Return the name of a GGUF's file type."""
    try:
        field = gguf.GGUFReader(path).fields.get("general.file_type")
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} is not a whole GGUF model: {error}.") from error
    number = -1 if field is None else int(field.contents())
    names = {kind.ftype: kind.name for kind in QUANTIZATION_TYPES.values()}
    if number not in names:
        raise BenchError(f"{path} does not say its file type (general.file_type); convert the checkpoint anew.")
    return names[number]


def _whole(logits: Path) -> bool:
    try:
        LogitsFile.open(logits)
    except BenchError:
        return False
    return True


def _matrix_digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise BenchError(f"The importance matrix {path} cannot be read: {error.strerror}.") from error


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise BenchError(f"The text {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BenchError(f"The text {path} is not UTF-8: {error.reason}.") from error
