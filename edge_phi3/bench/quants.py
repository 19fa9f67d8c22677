"""Measure several quantisations of one model: how large, how good, how fast.

All is compared with one reference, the F16 model. What takes long is kept in the output folder and used again: files
are made by `edge_phi3.conversion.journey`, and each figure carries a digest of all that it depends on.
"""

import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.options import FILE, Option
from edge_phi3.bench.quant_report import FORMAT, Measurement, QuantReport, read_report
from edge_phi3.bench.quant_worker import Conditions, Job, measure
from edge_phi3.bench.report_files import write_csv, write_json
from edge_phi3.conversion import tool_versions
from edge_phi3.conversion.journey import LOCK_NAME, Journey, Stop, choose_types
from edge_phi3.conversion.json_files import MAX_BYTES
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES, QuantizationType
from edge_phi3.files import locked, read_bounded
from edge_phi3.gguf_file import GgufError, read_gguf
from edge_phi3.progress import ProgressReporter, SilentProgress

EVALUATION_NAME = "edge-phi3 evaluation.txt"
"""What reports call the packaged text."""

DEFAULT_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K", "IQ2_M")
"""One good type for each step in size."""

REPORT_NAME = "quants.json"


def evaluation_text() -> str:
    """Return the packaged evaluation text: conversations in Phi-3's chat format, none of them calibration text."""
    return files("edge_phi3.bench").joinpath("evaluation.txt").read_text("utf-8")


class QuantBench(Conditions, frozen=True):
    """What to measure, and how: options of `edge-phi3 bench quants`.

    `model` is a GGUF in F16, BF16 or F32, or a checkpoint, which is converted to F16; `command`, as which this
    was requested, is recorded in the report.
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
        self._bench, self._progress = bench, progress
        self._folder = bench.output_dir
        self._name = bench.model.resolve().name.removesuffix(".gguf")
        try:
            self._text = evaluation_text() if bench.text is None else _read(bench.text, "text").decode()
        except UnicodeDecodeError as error:
            raise BenchError(f"The text {bench.text} is not UTF-8: {error.reason}.") from error
        self._text_sha256 = hashlib.sha256(self._text.encode()).hexdigest()
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
        guide = None if matrix is None else hashlib.sha256(_read(matrix, "importance matrix")).hexdigest()

        def key(name: str) -> str:
            guided = name != base_type and QUANTIZATION_TYPES[name].uses_imatrix
            return self._key(digest, name, guide if guided else None)

        logits = self._folder / f"{self._name}-{key(base_type)[:12]}.log-probs.npy"
        for other in set(self._folder.glob(f"{self._name}-*.log-probs.npy")) - {logits}:
            other.unlink()
        self._take_over({kind.name for kind in types} | {base_type}, key)
        if base_type not in self._found or not logits.exists():
            self._measure(base, logits, base_type, key(base_type), guided=False, reference=True)
        for kind in types:
            if kind.name in self._found:
                self._progress.note(f"{kind.name} is measured already.")
            else:
                self._quantised(base, logits, kind, matrix, key(kind.name))
        return self._report()

    def _take_over(self, asked: set[str], key: Callable[[str], str]) -> None:
        """Begin with what earlier runs measured with the same inputs, whether it is requested now or not."""
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
            if kind not in {"F32", "F16", "BF16"}:
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
        # What was measured with a matrix before is known by it, whatever is requested now.
        if self._journey.path("imatrix").exists() or any(kind.uses_imatrix for kind in types):
            return self._journey.collect(base).path
        return None

    def _quantised(self, base: Stop, logits: Path, kind: QuantizationType, matrix: Path | None, key: str) -> None:
        stop = self._journey.quantize(base, kind, matrix)
        guided = matrix is not None and kind.uses_imatrix
        try:
            self._measure(stop, logits, kind.name, key, guided=guided)
        finally:
            if stop.fresh and not self._bench.keep_models:
                stop.path.unlink(missing_ok=True)

    def _measure(self, stop: Stop, logits: Path, kind: str, key: str, *, guided: bool, reference: bool = False) -> None:
        """Measure a file, and write the report with it."""
        conditions = {name: getattr(self._bench, name) for name in Conditions.__struct_fields__}
        job = Job(model=stop.path, text=self._text, logits=logits, reference=reference, **conditions)
        size = stop.path.stat().st_size
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

    def _key(self, base: str, kind: str, matrix: str | None) -> str:
        """Return a digest of all that a type's figures depend on."""
        conditions = [getattr(self._bench, name) for name in Conditions.__struct_fields__]
        machine = [self._machine.cpu, self._machine.cores, list(tool_versions().values())]
        inputs = [FORMAT, base, kind, matrix, self._text_sha256, conditions, machine]
        return hashlib.sha256(msgspec.json.encode(inputs)).hexdigest()

    def _report(self) -> QuantReport:
        ordered = sorted(self._found.values(), key=lambda item: (not item.reference, -item.bytes))
        return QuantReport(
            model=self._name,
            text=EVALUATION_NAME if self._bench.text is None else self._bench.text.name,
            text_sha256=self._text_sha256,
            ctx_size=self._bench.ctx_size,
            threads=self._bench.threads,
            command=self._bench.command,
            measurements=ordered,
        )


def _type_of(path: Path) -> str:
    """Return the name of a GGUF's file type."""
    try:
        number = read_gguf(path).values.get("general.file_type")
    except (OSError, GgufError) as error:
        raise BenchError(f"{path} is not a whole GGUF model: {error}.") from error
    names = {kind.ftype: kind.name for kind in QUANTIZATION_TYPES.values()}
    if not isinstance(number, int) or number not in names:
        raise BenchError(f"{path} does not say its file type (general.file_type); convert the checkpoint anew.")
    return names[number]


def _read(path: Path, what: str) -> bytes:
    try:
        return read_bounded(path, MAX_BYTES, regular=False)
    except OSError as error:
        raise BenchError(f"The {what} {path} cannot be read: {error.strerror}.") from error
