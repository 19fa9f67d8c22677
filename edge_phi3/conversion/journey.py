"""The one way from a checkpoint to quantised files: conversion, importance matrix, quantisation.

What is whole and made from the same input is not made again. A manifest in the folder says of each file from what it
was made. It is written after the file has its final name, so that a killed run makes at most one file again, and the
same one: every step gives the same bytes each time.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edge_phi3.conversion import ConversionError, tool_versions
from edge_phi3.conversion.checkpoint import open_checkpoint
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import calibration_text, make_imatrix
from edge_phi3.conversion.metadata import SourceInfo
from edge_phi3.conversion.plan import plan_tensors, read_model
from edge_phi3.conversion.quantization_types import QuantizationType, quantization_type
from edge_phi3.conversion.quantize import quantize
from edge_phi3.files import PARTIAL_SUFFIX, atomic_output, require_space, sha256_of, shown
from edge_phi3.progress import ProgressReporter, SilentProgress

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"
ELSEWHERE = "choose another --output-dir"
_FORMAT, _MATRIX = 1, "imatrix"
_INPUTS = {".json", ".jinja", ".md", ".model", ".safetensors"}
"""How the names of those files of a checkpoint end that a conversion may read."""


class Seen(msgspec.Struct, frozen=True):
    """A file when it was last read: bytes, time of modification in nanoseconds, SHA-256 in hexadecimal."""

    size: int
    modified: int
    sha256: str


class MadeFile(msgspec.Struct, frozen=True):
    """A file of the journey: `type` is a quantisation type or ``imatrix``, `made_from` digests what it depends on."""

    name: str
    type: str
    bits_per_weight: float
    seconds: float
    made_from: str
    seen: Seen


class JourneyManifest(msgspec.Struct):
    """What is in a folder: made files by name, and the files that they were made from by path."""

    format: int = _FORMAT
    files: dict[str, MadeFile] = {}
    inputs: dict[str, Seen] = {}


class Stop(NamedTuple):
    """A file on the way; `fresh` when this run made it."""

    path: Path
    made: MadeFile
    fresh: bool


def choose_types(quants: Sequence[str], imatrix: Path | str) -> list[QuantizationType]:
    """Return the quantisation types of some names, each once; `ConversionError` when one lacks a matrix it needs."""
    types = list(dict.fromkeys(quantization_type(quant) for quant in quants))
    if imatrix == "none" and (needy := [type_.name for type_ in types if type_.needs_imatrix]):
        raise ConversionError(
            f"{needy[0]} needs an importance matrix; give --imatrix auto, or the path of one made before."
        )
    return types


class Journey:
    """The files made of one model in one folder, called ``NAME-TYPE.gguf``. Whoever uses it holds a lock on the folder.

    `n_gpu_layers` are used while the matrix is collected; `elsewhere` is what to do when the disk is full, beside
    freeing space. `sources` are the files of the checkpoint that was converted, by name.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        progress: ProgressReporter | None = None,
        *,
        threads: int | None = None,
        n_gpu_layers: int = -1,
        elsewhere: str = ELSEWHERE,
    ) -> None:
        self._folder, self._name, self._progress = folder, name, progress or SilentProgress()
        self._threads, self._n_gpu_layers, self._elsewhere = threads, n_gpu_layers, elsewhere
        for left in folder.glob(f".*{PARTIAL_SUFFIX}"):
            left.unlink(missing_ok=True)
        try:
            self._manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=JourneyManifest)
        except (OSError, msgspec.MsgspecError):
            self._manifest = JourneyManifest()
        if self._manifest.format != _FORMAT:  # what is of another counts as nothing, so that all is made again
            self._manifest = JourneyManifest()
        self.sources: dict[str, Seen] = {}

    def run(
        self,
        checkpoint: Path,
        types: Sequence[QuantizationType],
        *,
        outtype: str = "auto",
        source: SourceInfo | None = None,
        imatrix: Path | str = "auto",
        imatrix_chunks: int | None = None,
    ) -> list[Stop]:
        """Convert a checkpoint to `outtype` and quantise it to each type; in this order, with a matrix between.

        As `imatrix`, ``auto`` collects one for types of fewer than 8 bits, from at most `imatrix_chunks` of the
        packaged text; ``none`` does without, and a path is one made before.
        """
        matrix = None if imatrix in {"auto", "none"} else Path(imatrix)
        if matrix is not None:
            self._input(matrix)
        base = self.convert(checkpoint, types, outtype=outtype, source=source)
        stops = [base]
        if imatrix == "auto" and any(type_.uses_imatrix for type_ in types):
            stops.append(self.collect(base, imatrix_chunks))
            matrix = stops[-1].path
        return stops + [self.quantize(base, type_, matrix) for type_ in types if type_.name != base.made.type]

    def convert(
        self,
        checkpoint: Path,
        types: Sequence[QuantizationType] = (),
        *,
        outtype: str = "auto",
        source: SourceInfo | None = None,
    ) -> Stop:
        """Make the unquantised GGUF, once the disk has room for it and for quantisations to `types`."""
        opened = open_checkpoint(checkpoint)
        plan = plan_tensors(opened.tensors, read_model(opened), outtype)
        # What the disk cannot hold is refused before hours of work.
        sizes = {type_.name: int(plan.weights * type_.bits_per_weight / 8) for type_ in types}
        sizes[plan.matrices.name] = plan.size
        missing = {name: size for name, size in sizes.items() if not self.path(name).exists()}
        require_space(self._folder, sum(missing.values()), ", ".join(missing), self._elsewhere)
        paths = sorted(path for path in checkpoint.iterdir() if path.is_file() and path.suffix in _INPUTS)
        self.sources = {shown(path.name): self._input(path) for path in paths}
        hashes = {name: seen.sha256 for name, seen in self.sources.items()}

        def make(path: Path, progress: Any) -> float:
            convert(checkpoint, path, outtype=outtype, force=True, source=source, progress=progress)
            return 8 * plan.size / plan.weights

        made_from = ["convert", hashes, source and str(source)]
        return self._make(plan.matrices.name, made_from, f"Converting {self._name}", make)

    def begin_with(self, model: Path, kind: str) -> Stop:
        """Take a GGUF of type `kind`, wherever it is, for the conversion."""
        return Stop(model, MadeFile(model.name, kind, 0.0, 0.0, "", self._input(model)), fresh=False)

    def collect(self, base: Stop, chunks: int | None = None) -> Stop:
        """Make the importance matrix, with at most so many chunks of the packaged text."""

        def make(path: Path, progress: Any) -> float:
            options: dict[str, Any] = {"chunks": chunks, "threads": self._threads, "n_gpu_layers": self._n_gpu_layers}
            make_imatrix(base.path, path, force=True, progress=progress, **options)
            return 0.0

        text = hashlib.sha256(calibration_text().encode()).hexdigest()
        made_from = [_MATRIX, base.made.seen.sha256, text, chunks]
        return self._make(_MATRIX, made_from, f"Calibrating {self._name}", make)

    def quantize(self, base: Stop, type_: QuantizationType, matrix: Path | None) -> Stop:
        """Make one quantised file, with the matrix when the type uses one."""
        if (path := self.path(type_.name)).exists() and path.samefile(base.path):
            raise ConversionError(f"{path} is the model itself; {self._elsewhere}.")
        guide = matrix if type_.uses_imatrix else None

        def make(path: Path, progress: Any) -> float:
            options: dict[str, Any] = {"type": type_.name, "imatrix": guide, "threads": self._threads}
            return quantize(base.path, path, force=True, progress=progress, **options).bits_per_weight

        # The matrix's name is written into the file, and so counts as its content does.
        guided_by = None if guide is None else [guide.name, self._input(guide).sha256]
        made_from = ["quantize", base.made.seen.sha256, type_.name, guided_by]
        return self._make(type_.name, made_from, f"Quantising {self._name} to {type_.name}", make)

    def path(self, kind: str) -> Path:
        """Return where the file of a type is, or will be; ``imatrix`` is the matrix."""
        return self._folder / f"{self._name}-{kind}.gguf"

    def _make(self, kind: str, made_from: object, title: str, make: Callable[[Path, Any], float]) -> Stop:
        path = self.path(kind)
        key = hashlib.sha256(msgspec.json.encode([_FORMAT, made_from, tool_versions()], order="sorted")).hexdigest()
        known = self._manifest.files.get(path.name)
        if known is not None and known.made_from == key and path.is_file():
            seen = _see(path, known.seen)
            if seen.sha256 == known.seen.sha256:
                self._progress.note(f"{path.name} is whole already.")
                return Stop(path, known, fresh=False)
        started = time.monotonic()
        with self._progress.step(title) as step:
            bits = make(path, step.update)
        seconds = time.monotonic() - started
        made = MadeFile(path.name, kind, bits, seconds, key, _see(path, None))
        self._manifest.files[path.name] = made
        with atomic_output(self._folder / MANIFEST_NAME, force=True) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self._manifest, order="sorted")) + b"\n")
        return Stop(path, made, fresh=True)

    def _input(self, path: Path) -> Seen:
        """Look at a file; one whose size and time are those of the last run is not read again."""
        key = shown(path.resolve())
        before = self._manifest.inputs.get(key)
        try:
            seen = _see(path, before)
        except OSError as error:
            raise ConversionError(f"{path} cannot be read: {error.strerror}.") from error
        self._manifest.inputs[key] = seen
        return seen


def _see(path: Path, before: Seen | None) -> Seen:
    status = path.stat()
    if before is not None and (before.size, before.modified) == (status.st_size, status.st_mtime_ns):
        return before
    return Seen(status.st_size, status.st_mtime_ns, sha256_of(path))
