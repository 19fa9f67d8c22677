"""The model store: makes what a reference asks for, once, and finds it again at once and without a network."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from edge_phi3.catalog.build import STORE_VARIABLE, Build, CatalogError
from edge_phi3.catalog.listing import CHECKPOINT_FILES, UnreachableError
from edge_phi3.catalog.manifest import MANIFEST_NAME, Manifest, read_manifest
from edge_phi3.catalog.reference import (
    HubCheckpoint,
    HubGguf,
    LocalCheckpoint,
    LocalGguf,
    Reference,
    parse_reference,
)
from edge_phi3.conversion.quantization_types import quantization_type
from edge_phi3.files import sha256_of
from edge_phi3.progress import ProgressReporter, SilentProgress

_WHOLE_FILE = 32 << 20
"""Files up to this many bytes are told apart by their content, larger ones by size, time, head and tail."""

_HEAD = 64 << 10


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on this machine, ready to be loaded.

    Attributes:
        path: the GGUF to load; the first part of a split one.
        name: what it is served under: the preset, repository or folder that was asked for.
        source: where it came from: a repository, or a path.
        revision: the commit of the repository, None for what came from a path.
        quant: its quantisation, None when it was ready-made.
        manifest: what the store knows of it, None for a file that is served where it lies.
    """

    path: Path
    name: str
    source: str
    revision: str | None
    quant: str | None
    manifest: Manifest | None


class Catalog:
    """Turns references into models of the store.

    The store may be copied from machine to machine, and may be read-only once it holds what is asked for.
    """

    def __init__(self, store: Path | None = None) -> None:
        """Use the folder `store`, by default that of EDGE_PHI3_STORE or one in the user's cache folder."""
        given = store or os.environ.get(STORE_VARIABLE)
        self.store = Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("edge-phi3")) / "models"

    def resolve(
        self,
        reference: str | None,
        *,
        quant: str = "Q4_K_M",
        progress: ProgressReporter | None = None,
        refresh: bool = False,
        keep_intermediate: bool = False,
    ) -> StoredModel:
        """Give the model of a reference; download, convert and quantise what is missing.

        What is in the store whole is given at once, and the network is not asked. Two processes that want the same
        model make it once: the second waits.

        Args:
            reference: see `edge_phi3.catalog.reference.parse_reference`.
            quant: file type for a checkpoint, a name of ``QUANTIZATION_TYPES``; ready-made GGUFs stay as they are.
            progress: told of downloads, conversion and quantisation.
            refresh: ask the Hub whether the revision has moved, and make the model again when it has.
            keep_intermediate: keep the downloaded checkpoint and the unquantised GGUF, for other quantisations.

        Raises:
            ModelReferenceError: the reference means nothing.
            UnknownQuantizationError: `quant` is not a file type.
            HubError: the Hub does not give what is asked for.
            CatalogError: it cannot be made here: no network, no space, a type that needs an importance matrix.
            ConversionError, QuantizeError: the checkpoint cannot be converted or quantised.
        """
        wanted = parse_reference(reference)
        progress = progress or SilentProgress()
        if isinstance(wanted, LocalGguf):
            return StoredModel(wanted.path, wanted.name, str(wanted.path), None, None, None)
        chosen = None if isinstance(wanted, HubGguf) else _quantisation(quant)
        shelf = self.store / _shelf_name(wanted)
        folder = shelf / (chosen or _slug(wanted.name))
        manifest = read_manifest(folder)
        if manifest is None or (refresh and not isinstance(wanted, LocalCheckpoint)):
            with _system_errors(self.store), self._locked(shelf, progress):
                # Another process may have made it in the meantime.
                manifest = read_manifest(folder)
                if manifest is None or refresh:
                    build = Build(shelf, folder, chosen, progress, keep=keep_intermediate)
                    manifest = self._build(build, wanted, chosen, manifest)
        return _stored(folder, manifest, wanted.name)

    def stored(self) -> list[StoredModel]:
        """List the whole models of the store."""
        folders = sorted(path.parent for path in self.store.glob(f"*/*/{MANIFEST_NAME}"))
        return [_stored(folder, manifest, manifest.name) for folder in folders if (manifest := read_manifest(folder))]

    def verify(self, model: StoredModel) -> None:
        """Read a model's files again and compare them with its manifest, after a copy for instance.

        Raises:
            CatalogError: a file has changed.
        """
        for file in model.manifest.files if model.manifest else []:
            path = model.path.with_name(file.name)
            if sha256_of(path) != file.sha256:
                raise CatalogError(f"{path} is damaged; delete its folder and pull {model.source} again.")

    def _build(self, build: Build, wanted: Reference, quant: str | None, present: Manifest | None) -> Manifest:
        try:
            if isinstance(wanted, HubGguf):
                return build.ready_made(wanted, present)
            if isinstance(wanted, HubCheckpoint):
                return build.from_hub(wanted, present)
            assert isinstance(wanted, LocalCheckpoint)
            return present or build.from_folder(wanted)
        except UnreachableError as error:
            if present is not None:
                build.progress.note(f"{error}; the model stays as it is in the store.")
                return present
            raise CatalogError(self._without_network(wanted, quant, error)) from error

    @contextlib.contextmanager
    def _locked(self, shelf: Path, progress: ProgressReporter) -> Iterator[None]:
        """Hold the lock of a model's folder; the system frees it when the process ends, however it ends."""
        locks = self.store / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(locks / f"{shelf.name}.lock", poll_interval=0.5)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            progress.note(f"Another process is making {shelf.name}; waiting for it.")
            lock.acquire()
        try:
            yield
        finally:
            _prune(shelf)
            lock.release()

    def _without_network(self, wanted: Reference, quant: str | None, error: UnreachableError) -> str:
        assert isinstance(wanted, HubCheckpoint | HubGguf)
        command = f"edge-phi3 pull {wanted.text}" + (f" --quant {quant}" if quant else "")
        models = [f"{model.source} ({model.quant or model.path.name})" for model in self.stored()]
        holds = f" It holds {', '.join(models)}." if models else ""
        return (
            f"{wanted.text}{f' as {quant}' if quant else ''} is not in the store {self.store}, and {error}. On a"
            f" machine with a network run `{command}` and copy the folder {_shelf_name(wanted)} of its store into"
            f" this one; or name a file or folder that is here.{holds}"
        )


def _stored(folder: Path, manifest: Manifest, name: str) -> StoredModel:
    path = folder / manifest.files[0].name
    return StoredModel(path, name, manifest.source, manifest.revision, manifest.quant, manifest)


def _quantisation(quant: str) -> str:
    chosen = quantization_type(quant)
    if chosen.needs_imatrix:
        raise CatalogError(
            f"{chosen.name} needs an importance matrix, which no download has; make the model with"
            " scripts/convert_and_quantize.py --imatrix auto, and name the GGUF that it writes."
        )
    return chosen.name


def _slug(text: str) -> str:
    """Give a name for a folder."""
    return re.sub(r"[^\w.-]", "_", text.replace("/", "--"), flags=re.ASCII).strip(".") or "model"


def _shelf_name(wanted: HubCheckpoint | HubGguf | LocalCheckpoint) -> str:
    """Name the folder that holds all quantisations of a model."""
    if isinstance(wanted, LocalCheckpoint):
        return f"{_slug(wanted.name)}-{_fingerprint(wanted.path)[:16]}"
    return f"{_slug(wanted.repository)}@{_slug(wanted.revision)}"


def _fingerprint(folder: Path) -> str:
    """Tell the content of a checkpoint from that of another, in milliseconds.

    Small files are hashed whole, so that a copy of the bundled model is the same model. Of large ones, size, time of
    change, first and last bytes are: reading gigabytes at every start would take longer than loading them.
    """
    digest = hashlib.sha256()
    names = {*CHECKPOINT_FILES, *(path.name for path in folder.glob("*.safetensors*"))}
    for path in sorted(folder / name for name in names):
        if not path.is_file():
            continue
        status = path.stat()
        digest.update(f"{path.name} {status.st_size}\n".encode())
        if status.st_size <= _WHOLE_FILE:
            digest.update(sha256_of(path).encode())
            continue
        with path.open("rb") as file:
            digest.update(f"{status.st_mtime_ns}\n".encode() + file.read(_HEAD))
            file.seek(max(0, status.st_size - _HEAD))
            digest.update(file.read())
    return digest.hexdigest()


def _prune(shelf: Path) -> None:
    """Delete the folders that hold nothing, which is what a failure leaves."""
    for folder in [*shelf.glob("*/checkpoint"), *shelf.glob("*/"), shelf]:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _system_errors(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or store
        raise CatalogError(
            f"{where}: {error.strerror or error}. The store is {store}: free some space, mend its permissions, or set"
            f" {STORE_VARIABLE} to another folder."
        ) from error
