"""What is in the store: a manifest beside each model, written last. Without it, a model is not whole."""

import datetime as dt
from pathlib import Path

import msgspec

FORMAT = 1
"""Raised when models made earlier must be made again; an older manifest counts as none."""

MANIFEST_NAME = "manifest.json"


class FileRecord(msgspec.Struct, frozen=True):
    """One file: its name without a folder, its size in bytes, its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a model came from and what it is.

    `name` is what was requested when it was made; `source` is a repository ``owner/name`` or a folder's name, and
    `revision` the commit of the `requested_revision`. The first of `files` is the one to load. `quant` is None for a
    ready-made GGUF, which is kept as it was published.
    """

    format: int
    name: str
    source: str
    files: list[FileRecord]
    made_from: list[FileRecord]
    tools: dict[str, str]
    created: dt.datetime
    revision: str | None = None
    requested_revision: str | None = None
    quant: str | None = None


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder whose files are all there with the right sizes, unread; None for any other."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
        whole = all((folder / file.name).stat().st_size == file.size for file in manifest.files)
    except (OSError, msgspec.MsgspecError):
        return None
    plain = all(Path(file.name).name == file.name for file in manifest.files)
    return manifest if manifest.format == FORMAT and manifest.files and whole and plain else None
