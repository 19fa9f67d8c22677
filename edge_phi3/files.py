"""Files that are whole or absent: written under a temporary name, flushed, and renamed into place; bounded reading."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock
from rich.filesize import decimal

from edge_phi3.errors import EdgePhi3Error

PARTIAL_SUFFIX = ".partial"
"""How the temporary name of an unfinished file ends. What carries it may be deleted at any time."""


class OutputExistsError(EdgePhi3Error):
    """The output path exists and overwriting was not requested."""


class NotGgufError(EdgePhi3Error):
    """A file does not begin as a GGUF does; the text is the sentence."""


class DiskFullError(EdgePhi3Error):
    """A disk has no room for what is going to be written."""


@contextlib.contextmanager
def atomic_output(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` when the block ends without an error.

    The temporary file lies in the folder of `path`, so that the rename is atomic. On any error, `KeyboardInterrupt`
    included, it is deleted and `path` is left as it was; what a killed process left of the same `path` is deleted
    before. The content is fsynced before the rename and the folder after it, so that a power cut leaves the old file or
    the new one.

    Raises:
        OutputExistsError: `path` exists and `force` is false (asked before and after the block).
    """
    refuse_existing(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError), left.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while a living process has it
            left.unlink()
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"
    try:
        with temporary.open("xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
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


def shown(path: Path | str) -> str:
    """Return a path as text that JSON and GGUF can hold, whatever bytes it has."""
    return os.fsencode(path).decode(errors="replace")


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; `OSError`, whose ``strerror`` ends a sentence, for a pipe or a device too."""
    # A pipe that nobody writes to would be waited for.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    code, why = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "it is a device or a pipe")
    raise OSError(code, why, str(path))


def read_start(path: Path, size: int = 4) -> bytes:
    """Return the first bytes of a file; errors as `open_regular`."""
    with open_regular(path) as file:
        return file.read(size)


def check_magic(path: Path, advice: str) -> None:
    """Raise `NotGgufError` when a file cannot be read or, with `advice`, does not begin as a GGUF does."""
    try:
        magic = read_start(path)
    except OSError as error:
        raise NotGgufError(f"{path} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise NotGgufError(f"{path} is not a GGUF file (it begins with {magic!r}); {advice}")


def read_bounded(path: Path, limit: int, *, regular: bool = True) -> bytes:
    """Return the content of a file of at most `limit` bytes, which is not `regular` if it may be a pipe or a device."""
    with open_regular(path) if regular else path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {decimal(limit)}", str(path))
    return content


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse (`OutputExistsError`) a folder, a device or a pipe, and a file that may not be replaced."""
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder; give the name of a file to write.")
    if path.exists() and not path.is_file():
        raise OutputExistsError(f"{path} is a device or a pipe; give the name of a file to write.")
    if path.exists() and not force:
        raise OutputExistsError(f"{path} exists; give --force to replace it, or another output path.")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
