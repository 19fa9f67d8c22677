"""Makes one model of the store: download, convert, quantise, and last the manifest. Each finished step is kept.

A killed run leaves finished downloads, the beginning of an unfinished one, and a finished conversion in a work folder
beside the model; the next run goes on from there.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.filesize import decimal

from edge_phi3.catalog.listing import (
    CHECKPOINT_FILES,
    RemoteFile,
    Snapshot,
    gguf_files,
    small_files,
    weight_files,
)
from edge_phi3.catalog.manifest import (
    FORMAT,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    all_tool_versions,
    record,
    write_manifest,
)
from edge_phi3.catalog.reference import HubCheckpoint, HubGguf, LocalCheckpoint
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import PARTIAL_SUFFIX, atomic_output
from edge_phi3.progress import ProgressReporter
from edge_phi3.version import __version__

if TYPE_CHECKING:
    from edge_phi3.catalog.hub import Hub

STORE_VARIABLE = "EDGE_PHI3_STORE"

_CONVERTED = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}
"""File types that the converter writes by itself, to its names for them."""

_MADE_FROM = "made-from.json"
_WORK = "work"


class CatalogError(EdgePhi3Error):
    """A model that cannot be had: no network, no space, a store that cannot be written."""


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a model is called and where it comes from; the fields of its manifest."""

    name: str
    source: str
    revision: str | None = None
    requested_revision: str | None = None


class Build:
    """One making of a model, with its folder locked by the caller."""

    def __init__(self, shelf: Path, folder: Path, quant: str | None, progress: ProgressReporter, *, keep: bool) -> None:
        """Make the model in `folder`, with work folders in `shelf`; `keep` the latter at the end."""
        self.progress = progress
        self._shelf = shelf
        self._folder = folder
        self._quant = quant or ""
        self._keep = keep

    def from_folder(self, wanted: LocalCheckpoint) -> Manifest:
        """Convert and quantise a checkpoint on this machine."""
        work = self._work("local")
        if not self._is_converted(work):
            names = {*CHECKPOINT_FILES, *(path.name for path in wanted.path.glob("*.safetensors*"))}
            files = [path for name in sorted(names) if (path := wanted.path / name).is_file()]
            weights = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
            self._require_space(wanted.name, weights, weights, wanted.path)
            self._convert(wanted.path, [record(path) for path in files], work, wanted.name, None)
        return self._finish(work, _Origin(wanted.name, wanted.path.name))

    def from_hub(self, wanted: HubCheckpoint, present: Manifest | None) -> Manifest:
        """Download, convert and quantise a checkpoint of the Hub, unless `present` is of its commit already."""
        hub = self._hub()
        snapshot = hub.snapshot(wanted.repository, wanted.revision)
        if present is not None and present.revision == snapshot.commit:
            return present
        work = self._work(snapshot.commit[:12])
        if not self._is_converted(work):
            checkpoint = work / "checkpoint"
            records = [self._download(hub, snapshot, file, checkpoint) for file in small_files(snapshot)]
            files = weight_files(snapshot, checkpoint)
            weights = sum(file.size or 0 for file in files)
            arrived = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors*"))
            self._require_space(wanted.text, max(0, weights - arrived) + weights, weights, checkpoint)
            records += [self._download(hub, snapshot, file, checkpoint) for file in files]
            self._convert(checkpoint, records, work, wanted.name, snapshot)
            if not self._keep:
                shutil.rmtree(checkpoint)
        return self._finish(work, _Origin(wanted.name, wanted.repository, snapshot.commit, wanted.revision))

    def ready_made(self, wanted: HubGguf, present: Manifest | None) -> Manifest:
        """Download GGUF files of the Hub, unless `present` is of its commit already."""
        hub = self._hub()
        snapshot = hub.snapshot(wanted.repository, wanted.revision)
        if present is not None and present.revision == snapshot.commit:
            return present
        files = gguf_files(snapshot, wanted.files)
        work = self._work(snapshot.commit[:12])
        arrived = sum(path.stat().st_size for path in work.glob("*.gguf*"))
        self._check_space(wanted.text, sum(file.size or 0 for file in files) - arrived)
        records = [self._download(hub, snapshot, file, work) for file in files]
        self._clear()
        for file in records:
            (work / file.name).replace(self._folder / file.name)
        origin = _Origin(wanted.name, wanted.repository, snapshot.commit, wanted.revision)
        return self._write(origin, records, records)

    def _hub(self) -> Hub:
        # Takes longer to import than all the rest of a start that finds its model in the store.
        from edge_phi3.catalog.hub import Hub  # noqa: PLC0415 (see above)

        return Hub(self.progress)

    def _work(self, source: str) -> Path:
        """Give the work folder; another version of the converter gets another one."""
        work = self._shelf / f"{_WORK}-{source}-{__version__}-{FORMAT}"
        work.mkdir(parents=True, exist_ok=True)
        for path in work.glob(f".*{PARTIAL_SUFFIX}"):
            path.unlink()
        return work

    def _is_converted(self, work: Path) -> bool:
        return self._converted(work).exists() and (work / _MADE_FROM).exists()

    def _converted(self, work: Path) -> Path:
        """Give the path of the conversion. It is renamed into place, and so is whole if it is there."""
        return work / f"{_CONVERTED.get(self._quant, 'auto')}.gguf"

    def _download(self, hub: Hub, snapshot: Snapshot, file: RemoteFile, folder: Path) -> FileRecord:
        target = folder / Path(file.name).name
        # Files get this name once they have been checked.
        return record(target) if target.exists() else hub.download(snapshot, file, target)

    def _convert(
        self, checkpoint: Path, files: list[FileRecord], work: Path, name: str, snapshot: Snapshot | None
    ) -> None:
        from edge_phi3.conversion.convert import SourceInfo, convert  # noqa: PLC0415 (slow to import)

        with self.progress.step(f"Converting {name}") as step:
            convert(
                checkpoint,
                self._converted(work),
                outtype=_CONVERTED.get(self._quant, "auto"),
                force=True,
                source=SourceInfo(snapshot.repository, snapshot.commit) if snapshot else None,
                progress=lambda now: step.update(now.done, now.total, now.tensor),
            )
        with atomic_output(work / _MADE_FROM, force=True) as temporary:
            temporary.write_bytes(msgspec.json.encode(files))

    def _finish(self, work: Path, origin: _Origin) -> Manifest:
        """Quantise, and write the manifest."""
        converted = self._converted(work)
        output = self._folder / f"{origin.name.rsplit('/', 1)[-1]}-{self._quant}.gguf"
        made_from = msgspec.json.decode((work / _MADE_FROM).read_bytes(), type=list[FileRecord])
        self._clear()
        if self._quant not in _CONVERTED:
            self._quantize(converted, output, origin.name)
        elif self._keep:
            shutil.copyfile(converted, output)
        else:
            converted.replace(output)
        return self._write(origin, [record(output)], made_from)

    def _quantize(self, converted: Path, output: Path, name: str) -> None:
        from edge_phi3.conversion.quantize import quantize  # noqa: PLC0415 (slow to import)

        with self.progress.step(f"Quantising {name} to {self._quant}") as step:
            quantize(
                converted,
                output,
                type=self._quant,
                progress=lambda now: step.update(now.done_bytes, now.total_bytes, now.tensor),
            )

    def _clear(self) -> None:
        """Take away an older model, its manifest first, and what killed runs left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / MANIFEST_NAME).unlink(missing_ok=True)
        for path in [*self._folder.glob("*.gguf"), *self._folder.glob(f".*{PARTIAL_SUFFIX}")]:
            path.unlink()

    def _write(self, origin: _Origin, files: list[FileRecord], made_from: list[FileRecord]) -> Manifest:
        manifest = Manifest(
            format=FORMAT,
            name=origin.name,
            source=origin.source,
            revision=origin.revision,
            requested_revision=origin.requested_revision,
            quant=self._quant or None,
            files=files,
            made_from=made_from,
            tools=all_tool_versions(),
            created=dt.datetime.now(dt.UTC),
        )
        write_manifest(self._folder, manifest)
        if not self._keep:
            for work in self._shelf.glob(f"{_WORK}-*"):
                shutil.rmtree(work)
        return manifest

    def _require_space(self, what: str, before: int, weights: int, checkpoint: Path) -> None:
        """Refuse what the disk cannot hold: downloads and conversion (`before`), then the quantised file."""
        output = 0
        if self._quant not in _CONVERTED:
            bits = QUANTIZATION_TYPES[self._quant].bits_per_weight
            output = int(weights * bits / _bits_of(checkpoint))
        self._check_space(what, before + output)

    def _check_space(self, what: str, needed: int) -> None:
        free = shutil.disk_usage(self._shelf).free
        if free < needed:
            raise CatalogError(
                f"Making {what} takes about {decimal(needed)}, and the disk of the store {self._shelf.parent} has"
                f" {decimal(free)} left; free some space, or set {STORE_VARIABLE} to a folder on another disk."
            )


def _bits_of(checkpoint: Path) -> int:
    """Give the bits of a weight in a checkpoint; a damaged config.json is the converter's to complain about."""
    try:
        config = json.loads((checkpoint / "config.json").read_bytes())
        return 32 if "float32" in {config.get("torch_dtype"), config.get("dtype")} else 16
    except (OSError, ValueError, AttributeError, TypeError):
        return 16
