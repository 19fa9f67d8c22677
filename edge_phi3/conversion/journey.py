"""From a checkpoint to quantised files in one go; what is whole and made from the same input is not made again.

A manifest in the output folder says of each file from what it was made. It is written after the file has its final
name, so that a killed run makes at most one file again, and the same one: every step gives the same bytes each time.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock
from rich.filesize import decimal

from edge_phi3.conversion.checkpoint import open_checkpoint
from edge_phi3.conversion.convert import SourceInfo, convert
from edge_phi3.conversion.errors import ConversionError
from edge_phi3.conversion.imatrix import calibration_text, make_imatrix
from edge_phi3.conversion.plan import plan_tensors
from edge_phi3.conversion.quantization_types import QuantizationType, quantization_type
from edge_phi3.conversion.quantize import quantize
from edge_phi3.conversion.tied import read_model
from edge_phi3.conversion.tool_versions import tool_versions
from edge_phi3.files import PARTIAL_SUFFIX, atomic_output, sha256_of
from edge_phi3.progress import ProgressReporter, SilentProgress

MANIFEST_NAME = "manifest.json"
_LOCK_NAME = ".lock"
_FORMAT = 1
_MATRIX = "imatrix"


class Seen(msgspec.Struct, frozen=True):
    """A file when it was last read: bytes, time of modification in nanoseconds, SHA-256 in hexadecimal."""

    size: int
    modified: int
    sha256: str


class MadeFile(msgspec.Struct, frozen=True):
    """A file of the journey.

    Attributes:
        name: without a folder.
        type: its quantisation type, or ``imatrix``.
        bits_per_weight: 0 for a matrix.
        seconds: how long it took to make, when it was made.
        made_from: a digest of all that it depends on.
        seen: the file itself.
    """

    name: str
    type: str
    bits_per_weight: float
    seconds: float
    made_from: str
    seen: Seen


class JourneyManifest(msgspec.Struct):
    """What is in an output folder: made files by name, and the checkpoint's files by path."""

    format: int = _FORMAT
    files: dict[str, MadeFile] = {}
    inputs: dict[str, Seen] = {}


@dataclass(frozen=True, slots=True)
class Stop:
    """A file at the journey's end; `fresh` when this run made it."""

    path: Path
    made: MadeFile
    fresh: bool


def run_journey(
    checkpoint: Path,
    quants: Sequence[str],
    output_dir: Path,
    *,
    name: str | None = None,
    imatrix: Path | str = "auto",
    imatrix_chunks: int | None = None,
    threads: int | None = None,
    source: SourceInfo | None = None,
    progress: ProgressReporter | None = None,
) -> list[Stop]:
    """Convert a checkpoint, collect an importance matrix, and quantise to each type.

    Args:
        checkpoint: a folder in the Hugging Face layout.
        quants: names of quantisation types.
        output_dir: where the files go, called ``NAME-TYPE.gguf``; made when absent.
        name: what the files are called after; by default the checkpoint's folder.
        imatrix: ``auto`` collects a matrix with the packaged text when a type of fewer than 8 bits is wanted,
            ``none`` does without, a path is a matrix made before.
        imatrix_chunks: how many chunks of the packaged text to evaluate at most.
        threads: CPU threads.
        source: repository and revision of the checkpoint.
        progress: told of each step.

    Returns:
        The conversion, the matrix if one was collected, and each quantisation, in this order.

    Raises:
        ConversionError, ImatrixError, QuantizeError, UnknownQuantizationError: a step cannot be done.
    """
    types = [quantization_type(quant) for quant in dict.fromkeys(quants)]
    if imatrix == "none" and (needy := [type_.name for type_ in types if type_.needs_imatrix]):
        raise ConversionError(
            f"{needy[0]} needs an importance matrix; give --imatrix auto, or the path of one made before."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir / _LOCK_NAME):
        for left in output_dir.glob(f".*{PARTIAL_SUFFIX}"):
            left.unlink(missing_ok=True)
        journey = _Journey(checkpoint, output_dir, name or checkpoint.resolve().name, progress or SilentProgress())
        journey.require_space(types)
        base = journey.convert(source)
        stops = [base]
        matrix: Path | None = None
        if imatrix == "auto":
            if any(type_.uses_imatrix for type_ in types):
                stops.append(journey.collect(base, imatrix_chunks, threads))
                matrix = stops[-1].path
        elif imatrix != "none":
            matrix = Path(imatrix)
        return stops + [
            journey.quantize(base, type_, matrix if type_.uses_imatrix else None, threads)
            for type_ in types
            if type_.name != base.made.type
        ]


class _Journey:
    def __init__(self, checkpoint: Path, folder: Path, name: str, progress: ProgressReporter) -> None:
        self._checkpoint, self._folder, self._name, self._progress = checkpoint, folder, name, progress
        self._opened = open_checkpoint(checkpoint)
        self._plan = plan_tensors(self._opened.tensors, read_model(self._opened), "auto")
        self._manifest = _read_manifest(folder)
        self._tools = tool_versions()

    def require_space(self, types: Sequence[QuantizationType]) -> None:
        """Refuse what the disk cannot hold, before hours of work."""
        sizes = {type_.name: int(self._plan.weights * type_.bits_per_weight / 8) for type_ in types}
        sizes[self._plan.matrices.name] = self._plan.size
        missing = {name: size for name, size in sizes.items() if not self._path(name).exists()}
        free = shutil.disk_usage(self._folder).free
        if free < sum(missing.values()):
            raise ConversionError(
                f"{', '.join(missing)} take about {decimal(sum(missing.values()))}, and the disk of {self._folder} has"
                f" {decimal(free)} left; free some space, or choose another --output-dir."
            )

    def convert(self, source: SourceInfo | None) -> Stop:
        """Make the unquantised GGUF."""
        paths = sorted(
            path
            for path in self._checkpoint.iterdir()
            if path.is_file() and path.suffix in {".json", ".jinja", ".md", ".model", ".safetensors"}
        )
        hashes = {path.name: self._input(path) for path in paths}
        kind = self._plan.matrices.name

        def make(path: Path) -> float:
            with self._progress.step(f"Converting {self._name}") as step:
                convert(
                    self._checkpoint,
                    path,
                    force=True,
                    source=source,
                    progress=lambda now: step.update(now.done, now.total, now.tensor),
                )
            return 8 * self._plan.size / self._plan.weights

        return self._make(self._path(kind), kind, ["convert", hashes, source and str(source)], make)

    def collect(self, base: Stop, chunks: int | None, threads: int | None) -> Stop:
        """Make the importance matrix."""
        text = calibration_text()
        size = len(text.encode())

        def make(path: Path) -> float:
            with self._progress.step(f"Calibrating {self._name}", size) as step:
                make_imatrix(
                    base.path,
                    path,
                    force=True,
                    chunks=chunks,
                    threads=threads,
                    progress=lambda now: step.update(
                        size * now.done // now.total, size, f"chunk {now.chunk} of {now.chunks}"
                    ),
                )
            return 0.0

        digest = hashlib.sha256(text.encode()).hexdigest()
        return self._make(self._path(_MATRIX), _MATRIX, [_MATRIX, base.made.seen.sha256, digest, chunks], make)

    def quantize(self, base: Stop, type_: QuantizationType, matrix: Path | None, threads: int | None) -> Stop:
        """Make one quantised file."""

        def make(path: Path) -> float:
            with self._progress.step(f"Quantising {self._name} to {type_.name}") as step:
                result = quantize(
                    base.path,
                    path,
                    type=type_.name,
                    imatrix=matrix,
                    threads=threads,
                    force=True,
                    progress=lambda now: step.update(now.done_bytes, now.total_bytes, now.tensor),
                )
            return result.bits_per_weight

        # The matrix's name is written into the file, and so counts as its content does.
        guide = None if matrix is None else [matrix.name, self._input(matrix)]
        made_from = ["quantize", base.made.seen.sha256, type_.name, guide]
        return self._make(self._path(type_.name), type_.name, made_from, make)

    def _make(self, path: Path, kind: str, made_from: object, make: Callable[[Path], float]) -> Stop:
        key = hashlib.sha256(msgspec.json.encode([_FORMAT, made_from, self._tools], order="sorted")).hexdigest()
        known = self._manifest.files.get(path.name)
        if known is not None and known.made_from == key and path.is_file():
            seen = _see(path, known.seen)
            if seen.sha256 == known.seen.sha256:
                self._progress.note(f"{path.name} is whole already.")
                return Stop(path, known, fresh=False)
        started = time.monotonic()
        bits = make(path)
        seconds = time.monotonic() - started
        made = MadeFile(path.name, kind, bits, seconds, key, _see(path, None))
        self._manifest.files[path.name] = made
        self._save()
        return Stop(path, made, fresh=True)

    def _input(self, path: Path) -> str:
        """Give a file's hash; one whose size and time are those of the last run is not read again."""
        key = str(path.resolve())
        seen = _see(path, self._manifest.inputs.get(key))
        if seen != self._manifest.inputs.get(key):
            self._manifest.inputs[key] = seen
            self._save()
        return seen.sha256

    def _save(self) -> None:
        with atomic_output(self._folder / MANIFEST_NAME, force=True) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self._manifest, order="sorted")) + b"\n")

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._name}-{kind}.gguf"


def _see(path: Path, before: Seen | None) -> Seen:
    status = path.stat()
    if before is not None and (before.size, before.modified) == (status.st_size, status.st_mtime_ns):
        return before
    return Seen(status.st_size, status.st_mtime_ns, sha256_of(path))


def _read_manifest(folder: Path) -> JourneyManifest:
    """Give the folder's manifest; an absent, damaged or older one counts as empty, so that all is made again."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=JourneyManifest)
    except (OSError, msgspec.MsgspecError):
        return JourneyManifest()
    return manifest if manifest.format == _FORMAT else JourneyManifest()
