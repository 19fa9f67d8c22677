"""The model store: makes what a reference asks for, once, and finds it again at once and without a network."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import platformdirs

from edge_phi3.catalog.build import STORE_VARIABLE, WORK_PREFIX, Build, CatalogError
from edge_phi3.catalog.listing import CHECKPOINT_FILES, UnreachableError
from edge_phi3.catalog.manifest import MANIFEST_NAME, Manifest, read_manifest
from edge_phi3.catalog.reference import DEMO, HubCheckpoint, HubGguf, LocalCheckpoint, LocalGguf, parse_reference
from edge_phi3.conversion.quantization_types import quantization_type
from edge_phi3.files import locked, sha256_of
from edge_phi3.progress import ProgressReporter, SilentProgress

_WHOLE_FILE, _HEAD = 32 << 20, 64 << 10
"""Files up to this many bytes are told apart by their content, larger ones by size, time, head and tail."""

_LONGEST_NAME = 180
"""Characters of a folder's name; a file system takes 255 bytes, some of which the names of locks add."""

LOCKS = ".locks"
"""The folder of the locks; no shelf's name begins with a dot."""

_Wanted = HubCheckpoint | HubGguf | LocalCheckpoint


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on this machine, ready to be loaded.

    `path` is the GGUF to load, the first part of a split one. `name` is what it is served under: the preset, repository
    or folder that was requested; `source` is a repository, with the commit as `revision`, or a path. `quant` is None
    when it was ready-made, `manifest` for a file that is served where it lies.
    """

    path: Path
    name: str
    source: str
    revision: str | None
    quant: str | None
    manifest: Manifest | None


class Catalog:
    """Turns references into models of the store, which may be copied, and read-only once it holds what is asked for."""

    def __init__(self, store: Path | None = None) -> None:
        """Use the folder `store`, by default that of EDGE_PHI3_STORE or one in the user's cache folder."""
        given = store or os.environ.get(STORE_VARIABLE)
        self.store = Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("edge-phi3")) / "models"

    def resolve(self, reference: str | None, *, quant: str = "Q4_K_M", **options: Any) -> StoredModel:
        """Return the model of a reference, as `pull` does with one quantisation and the same options."""
        return self.pull(reference, [quant], **options)[0]

    def pull(
        self,
        reference: str | None,
        quants: Sequence[str],
        *,
        progress: ProgressReporter | None = None,
        refresh: bool = False,
        keep_intermediate: bool = False,
    ) -> list[StoredModel]:
        """Return the models of a reference (see `parse_reference`), one for each type; make what is missing.

        What is in the store whole is returned at once, without the network. Two processes that want the same
        model make it once: the second waits. Ready-made GGUFs stay as they are. With `refresh` the Hub is asked whether
        the revision has moved, and `keep_intermediate` keeps the checkpoint and the unquantised GGUF.

        Raises:
            ModelReferenceError, UnknownQuantizationError: the reference, or one of `quants`, means nothing.
            HubError: the Hub does not provide the requested files.
            CatalogError: it cannot be made here: no network, a type that needs an importance matrix.
            DiskFullError, ConversionError, QuantizeError: the checkpoint cannot be converted or quantised.
        """
        wanted = parse_reference(reference)
        progress = progress or SilentProgress()
        if isinstance(wanted, LocalGguf):
            return [StoredModel(wanted.path, wanted.name, str(wanted.path), None, None, None)]
        ready = isinstance(wanted, HubGguf)
        types = [""] if ready else list(dict.fromkeys(_quantisation(quant) for quant in quants))
        shelf = self.store / shelf_name(wanted)
        found = {folder: read_manifest(folder) for folder in (shelf / folder_name(wanted, kind) for kind in types)}
        if None in found.values() or (refresh and not isinstance(wanted, LocalCheckpoint)):
            with _system_errors(self.store), self._locked(shelf, progress):
                # Another process may have made them in the meantime.
                found = {folder: read_manifest(folder) for folder in found}
                if None in found.values() or refresh:
                    try:
                        build = Build(shelf, wanted, progress, keep=keep_intermediate)
                        found |= build.make(found, refresh=refresh)
                    except UnreachableError as error:
                        if None in found.values():
                            raise CatalogError(self._without_network(wanted, [] if ready else types, error)) from error
                        progress.note(f"{error}; the model stays as it is in the store.")
        for folder in found:
            with contextlib.suppress(OSError):  # of a store that cannot be written
                os.utime(folder / MANIFEST_NAME)
        return [_stored(folder, manifest, wanted.name) for folder, manifest in found.items() if manifest is not None]

    def find(self, wanted: HubGguf) -> StoredModel | None:
        """Return a ready-made model if the store holds it, without the network."""
        folder = self.store / shelf_name(wanted) / folder_name(wanted)
        manifest = read_manifest(folder)
        return None if manifest is None else _stored(folder, manifest, wanted.name)

    def stored(self) -> list[StoredModel]:
        """List the whole models of the store."""
        folders = sorted(path.parent for path in self.store.glob(f"*/*/{MANIFEST_NAME}"))
        return [_stored(folder, manifest, manifest.name) for folder in folders if (manifest := read_manifest(folder))]

    def called(self, name: str, quants: Sequence[str] = ()) -> list[StoredModel]:
        """Return the whole models of a name or source, of some types only if any are given; `CatalogError` if none."""
        types = [quantization_type(quant).name for quant in quants]
        name, stored = DEMO if name == "demo" else name, self.stored()
        found = [each for each in stored if name in {each.name, each.source} and (not types or each.quant in types)]
        if not found:
            kinds, known = " as ".join([name, *types[:1]]), ", ".join(sorted({each.name for each in stored}))
            raise CatalogError(f"{kinds} is not in the store {self.store}; it holds {known or 'no model'}.")
        return found

    def leftovers(self) -> list[tuple[Path, str]]:
        """List the folders that hold no whole model, and call each "damaged", or "unfinished" where a run may go on."""
        folders = sorted(folder for folder in self.store.glob("*/*/") if folder.parent.name != LOCKS)
        kinds = ((folder, "unfinished" if folder.name.startswith(WORK_PREFIX) else "damaged") for folder in folders)
        return [(folder, kind) for folder, kind in kinds if read_manifest(folder) is None]

    def verify(self, model: StoredModel) -> None:
        """Compare a model's files with its manifest, after a copy for instance; `CatalogError` when one has changed."""
        for file in model.manifest.files if model.manifest else []:
            path = model.path.with_name(file.name)
            with _system_errors(self.store):
                whole = sha256_of(path) == file.sha256
            if not whole:
                raise CatalogError(f"{path} is damaged; `edge-phi3 models rm` it, and pull {model.source} again.")

    def remove(self, folder: Path, progress: ProgressReporter | None = None) -> None:
        """Delete a folder of the store, of a model (its manifest first) or of unfinished work."""
        with _system_errors(self.store), self._locked(folder.parent, progress or SilentProgress()):
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder)

    @contextlib.contextmanager
    def _locked(self, shelf: Path, progress: ProgressReporter) -> Iterator[None]:
        waiting = f"Another process is making {shelf.name}; waiting for it."
        with locked(self.store / LOCKS / f"{shelf.name}.lock", lambda: progress.note(waiting)):
            try:
                yield
            finally:
                # What a failure leaves are folders that hold nothing.
                for folder in [*shelf.glob("*/*/"), *shelf.glob("*/"), shelf]:
                    with contextlib.suppress(OSError):
                        folder.rmdir()

    def _without_network(self, wanted: _Wanted, quants: Sequence[str], error: UnreachableError) -> str:
        assert not isinstance(wanted, LocalCheckpoint)
        command = " ".join([f"edge-phi3 pull {wanted.text}", *(f"--quant {quant}" for quant in quants)])
        models = [f"{model.source} ({model.quant or model.path.name})" for model in self.stored()]
        holds = f" It holds {', '.join(models)}." if models else ""
        kinds = f" as {', '.join(quants)}" if quants else ""
        return (
            f"{wanted.text}{kinds} is not in the store {self.store}, and {error}. On a"
            f" machine with a network run `{command}` and copy the folder {shelf_name(wanted)} of its store into"
            f" this one; or name a file or folder that is here.{holds}"
        )


def _stored(folder: Path, manifest: Manifest, name: str) -> StoredModel:
    path = folder / manifest.files[0].name
    return StoredModel(path, name, manifest.source, manifest.revision, manifest.quant, manifest)


def _quantisation(quant: str) -> str:
    chosen = quantization_type(quant)
    if chosen.needs_imatrix:
        raise CatalogError(
            f"{chosen.name} needs an importance matrix, which the store's models are made without; add"
            " --output-dir DIR to `edge-phi3 pull`, and name the GGUF that it makes there."
        )
    return chosen.name


def shelf_name(wanted: _Wanted) -> str:
    """Return the name of the folder that holds all quantisations of a model, or all GGUF files of a revision."""
    if isinstance(wanted, LocalCheckpoint):
        return _file_name(f"{_quoted(wanted.name)}-{_fingerprint(wanted.path)[:16]}")
    # No repository has "--" in its name.
    return _file_name(f"{wanted.repository.replace('/', '--')}@{_quoted(wanted.revision)}")


def folder_name(wanted: _Wanted, quant: str = "") -> str:
    """Return the name of a model's folder on its shelf: its quantisation, or the path of a file in its repository."""
    return _file_name(_quoted(wanted.files[0])) if isinstance(wanted, HubGguf) else quant


def _quoted(text: str) -> str:
    return quote(text, safe="", errors="surrogateescape")


def _file_name(quoted: str) -> str:
    """Return a name that a file may have and that is not hidden, another one for every other quoted text."""
    name = f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:100]}+{hashlib.sha256(name.encode()).hexdigest()}"


def _fingerprint(folder: Path) -> str:
    # Small files are hashed whole, so that a copy of the bundled model is the same model. Of large ones, size, time of
    # change, first and last bytes are: reading gigabytes at every start would take longer than loading them.
    digest = hashlib.sha256()
    names = {*CHECKPOINT_FILES, *(path.name for path in folder.glob("*.safetensors*"))}
    for path in filter(Path.is_file, sorted(folder / name for name in names)):
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
