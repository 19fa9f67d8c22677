"""Makes models: downloads what is missing, and sends a checkpoint through `edge_phi3.conversion.journey`.

A killed run leaves finished downloads, the beginning of an unfinished one, and what the journey has finished; the next
run goes on from there.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_phi3.catalog.listing import gguf_files, small_files, weight_files
from edge_phi3.catalog.manifest import FORMAT, MANIFEST_NAME, FileRecord, Manifest
from edge_phi3.catalog.reference import HubCheckpoint, HubGguf, LocalCheckpoint
from edge_phi3.conversion import tool_versions
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import PARTIAL_SUFFIX, atomic_output, locked, require_space, shown
from edge_phi3.progress import ProgressReporter
from edge_phi3.version import __version__

# These take longer to import than all the rest of a start that finds its model in the store.
if TYPE_CHECKING:
    from edge_phi3.catalog.hub import Repository
    from edge_phi3.conversion.journey import Stop
    from edge_phi3.conversion.metadata import SourceInfo

STORE_VARIABLE = "EDGE_PHI3_STORE"

WORK_PREFIX = ".work-"
"""How the names of work folders begin; no model's folder is called so."""

_DIRECT = frozenset({"F32", "F16", "BF16", "Q8_0"})
"""Types that the converter writes by itself."""

_ELSEWHERE = f"set {STORE_VARIABLE} to a folder on another disk"


class CatalogError(EdgePhi3Error):
    """A model that cannot be had: no network, a store that cannot be written, a type that needs a matrix."""


class Build:
    """One making of the models of one reference, whose shelf the caller has locked; `keep` what is made on the way."""

    def __init__(
        self, shelf: Path, wanted: LocalCheckpoint | HubCheckpoint | HubGguf, progress: ProgressReporter, *, keep: bool
    ) -> None:
        self._shelf, self._wanted, self._progress, self._keep = shelf, wanted, progress, keep
        self._repository = None if isinstance(wanted, LocalCheckpoint) else _repository(wanted, progress)
        self._commit = self._repository.snapshot.commit if self._repository else None

    def make(self, found: Mapping[Path, Manifest | None], *, refresh: bool) -> dict[Path, Manifest]:
        """Make the models that are not there, and with `refresh` those of another commit; return all manifests.

        `found` has each model's folder, called as its quantisation if it has one, and its manifest if it is there.
        """
        whole = {
            folder: manifest
            for folder, manifest in found.items()
            if manifest is not None and not (refresh and manifest.revision != self._commit)
        }
        missing = [folder for folder in found if folder not in whole]
        if missing:
            source = self._commit[:12] if self._commit else "local"
            work = self._shelf / f"{WORK_PREFIX}{source}-{__version__}-{FORMAT}"
            work.mkdir(parents=True, exist_ok=True)
            if isinstance(self._wanted, HubGguf):
                whole |= {folder: self._take(self._wanted, folder, work / folder.name) for folder in missing}
            else:
                whole |= self._quantise(self._wanted, missing, work)
            for left in [] if self._keep else self._shelf.glob(f"{WORK_PREFIX}*"):
                shutil.rmtree(left)
        return {folder: whole[folder] for folder in found}

    def _take(self, wanted: HubGguf, folder: Path, work: Path) -> Manifest:
        assert self._repository is not None
        files = gguf_files(self._repository.snapshot, wanted.files)
        work.mkdir(exist_ok=True)
        arrived = sum(path.stat().st_size for path in work.iterdir())
        require_space(work, sum(file.size or 0 for file in files) - arrived, wanted.text, _ELSEWHERE)
        records = self._repository.fetch(files, work)
        return self._store(folder, work, records, records, None)

    def _quantise(
        self, wanted: LocalCheckpoint | HubCheckpoint, folders: Sequence[Path], work: Path
    ) -> dict[Path, Manifest]:
        from edge_phi3.conversion.journey import Journey  # noqa: PLC0415 (see above)

        groups: dict[str, list[Path]] = {}
        # What the converter writes by itself comes last: the others may be made from the same file.
        for folder in sorted(folders, key=lambda folder: folder.name in _DIRECT):
            groups.setdefault(folder.name.lower() if folder.name in _DIRECT else "auto", []).append(folder)
        outputs = [*(folder.name for folder in folders), *([None] if "auto" in groups else [])]
        checkpoint, source = wanted.path if isinstance(wanted, LocalCheckpoint) else work / "checkpoint", None
        if self._repository is not None:
            source = fetch_checkpoint(self._repository, checkpoint, outputs, _ELSEWHERE)
        journey = Journey(work, wanted.name.rsplit("/", 1)[-1], self._progress, elsewhere=_ELSEWHERE)
        made: dict[Path, Manifest] = {}
        for outtype, group in groups.items():
            types = [QUANTIZATION_TYPES[folder.name] for folder in group]
            stops = journey.run(checkpoint, types, outtype=outtype, source=source, imatrix="none")
            made_from = [FileRecord(name, seen.size, seen.sha256) for name, seen in journey.sources.items()]
            for folder, stop in zip(group, stops[-len(group) :], strict=True):
                record = FileRecord(stop.path.name, stop.made.seen.size, stop.made.seen.sha256)
                made[folder] = self._store(folder, work, [record], made_from, folder.name)
        return made

    def _store(
        self, folder: Path, work: Path, made: list[FileRecord], made_from: list[FileRecord], quant: str | None
    ) -> Manifest:
        """Move made files to a model's folder, beside the model that is there, and put them in its place."""
        wanted = self._wanted
        folder.mkdir(parents=True, exist_ok=True)
        taken = any((folder / file.name).exists() for file in made)
        prefix = f"{self._commit[:12]}-" if self._commit and taken else ""
        files = [FileRecord(f"{prefix}{file.name}", file.size, file.sha256) for file in made]
        place: Callable[[Path, Path], object] = Path.replace
        if self._keep and quant in _DIRECT:
            place = shutil.copyfile
        for file, stored in zip(made, files, strict=True):
            place(work / file.name, folder / stored.name)
        manifest = Manifest(
            format=FORMAT,
            name=wanted.name,
            source=shown(wanted.path.name) if isinstance(wanted, LocalCheckpoint) else wanted.repository,
            revision=self._commit,
            requested_revision=None if isinstance(wanted, LocalCheckpoint) else wanted.revision,
            quant=quant,
            files=files,
            made_from=made_from,
            tools=tool_versions() | {"huggingface-hub": importlib.metadata.version("huggingface-hub")},
            created=dt.datetime.now(dt.UTC),
        )
        with atomic_output(folder / MANIFEST_NAME, force=True) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        # Only now is the older model of no use: a killed run leaves one of the two whole.
        names = {MANIFEST_NAME, *(file.name for file in files)}
        for path in [path for path in folder.iterdir() if path.name not in names]:
            path.unlink()
        return manifest


def make_files(
    wanted: LocalCheckpoint | HubCheckpoint,
    quants: Sequence[str],
    output_dir: Path,
    progress: ProgressReporter,
    *,
    imatrix: Path | str = "auto",
    imatrix_chunks: int | None = None,
    threads: int | None = None,
) -> list[Stop]:
    """Make quantised files of a checkpoint in a folder beside the store, where downloads stay too; see `Journey.run`.

    Raises:
        HubError, DiskFullError: the Hub does not provide the requested files, or the disk has no room for all.
        ConversionError, ImatrixError, QuantizeError, UnknownQuantizationError: a step cannot be done.
    """
    from edge_phi3.conversion.journey import ELSEWHERE, LOCK_NAME, Journey, choose_types  # noqa: PLC0415 (see above)

    types = choose_types(quants, imatrix)
    with locked(
        output_dir / LOCK_NAME, lambda: progress.note(f"Another process works in {output_dir}; waiting for it.")
    ):
        source = None
        if isinstance(wanted, LocalCheckpoint):
            checkpoint = wanted.path
        else:
            repository = _repository(wanted, progress)
            checkpoint = output_dir / f"checkpoint-{repository.snapshot.commit[:12]}"
            source = fetch_checkpoint(repository, checkpoint, [None, *(type_.name for type_ in types)], ELSEWHERE)
        journey = Journey(output_dir, wanted.name.rsplit("/", 1)[-1], progress, threads=threads)
        return journey.run(checkpoint, types, source=source, imatrix=imatrix, imatrix_chunks=imatrix_chunks)


def fetch_checkpoint(repository: Repository, folder: Path, outputs: Sequence[str | None], elsewhere: str) -> SourceInfo:
    """Download what is missing of a checkpoint; `HubError` when it is none, or the Hub does not give it.

    The disk must hold the `outputs` too, files of these types made of it, None for its own type; `elsewhere` is what
    to do when it does not (`DiskFullError`), beside freeing space.
    """
    from edge_phi3.conversion.metadata import SourceInfo  # noqa: PLC0415 (see above)

    snapshot = repository.snapshot
    repository.fetch(small_files(snapshot), folder)
    files = weight_files(snapshot, folder)
    missing = [file for file in files if not (folder / file.name).exists()]
    if missing:
        weights, bits = sum(file.size or 0 for file in files), _bits_of(folder)
        made = sum(weights * (QUANTIZATION_TYPES[kind].bits_per_weight if kind else bits) for kind in outputs)
        arrived = sum(path.stat().st_size for path in folder.glob(f"*.safetensors{PARTIAL_SUFFIX}"))
        needed = sum(file.size or 0 for file in missing) - arrived + int(made / bits)
        require_space(folder, needed, f"{snapshot.repository} and what is made of it", elsewhere)
    repository.fetch(missing, folder)
    return SourceInfo(snapshot.repository, snapshot.commit)


def _repository(wanted: HubCheckpoint | HubGguf, progress: ProgressReporter) -> Repository:
    from edge_phi3.catalog.hub import Repository  # noqa: PLC0415 (see above)

    return Repository(wanted.repository, wanted.revision, progress)


def _bits_of(checkpoint: Path) -> int:
    try:
        config = json.loads((checkpoint / "config.json").read_bytes())
        return 32 if "float32" in {config.get("torch_dtype"), config.get("dtype")} else 16
    except (OSError, ValueError, AttributeError, TypeError):
        return 16  # what is damaged is the converter's to complain about
