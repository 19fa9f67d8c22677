"""Files that are whole or absent: written under a temporary name, flushed, and renamed into place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
from rich.filesize import decimal

from edge_phi3.errors import EdgePhi3Error

PARTIAL_SUFFIX = ".partial"
"""How the temporary name of an unfinished file ends. What carries it may be deleted at any time."""


class OutputExistsError(EdgePhi3Error):
    """The output path exists and overwriting was not requested."""


class DiskFullError(EdgePhi3Error):
    """A disk has no room for what is going to be written."""


@contextlib.contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` when the block ends without an error.

    The temporary file lies in the folder of `path`, so that the rename is atomic. On any error, `KeyboardInterrupt`
    included, it is deleted and `path` is left as it was. The content is fsynced before the rename and the folder
    after it, so that a power cut leaves the old file or the new one.

    Raises:
        OutputExistsError: `path` exists and `force` is false (asked before and after the block).
    """
    refuse_existing(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"
    try:
        yield temporary
        _fsync(temporary)
        refuse_existing(path, force=force)
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file while the block runs; the system frees it when the process ends, however it ends.

    `waiting` is called before it waits for another process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        waiting()
        lock.acquire(poll_interval=0.5)
    try:
        yield
    finally:
        lock.release()


def require_space(folder: Path, needed: int, what: str, elsewhere: str = "choose another folder") -> None:
    """Refuse (`DiskFullError`) what a folder's disk cannot hold; `elsewhere` is what to do beside freeing space."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"{what} will take about {decimal(needed)}, and the disk of {folder} has {decimal(free)} left;"
            f" free some space, or {elsewhere}."
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse (`OutputExistsError`) a folder, and a file that may not be replaced."""
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; give the name of a file to write.")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists; give --force to replace it, or another output path.")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
