"""The process and what surrounds it: streams that are full or closed, few descriptors, mapped files that are cut short.

Whatever happens to a verb, it ends with a sentence, and an exit code.
"""

import codecs
import ctypes
import errno
import io
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

from edge_phi3.errors import EdgePhi3Error

_DESCRIPTORS = 64
"""How many files a verb may have open at once; a service wants one more for each connection."""
_M_ARENA_MAX = -8
_PACKAGE = Path(__file__).parent


class SurroundingsError(EdgePhi3Error):
    """The process was started in a way in which it cannot work."""


class _Stream(io.FileIO):
    """stdout, whose reader must learn that something is missing, or stderr, which may be full, or read by nobody."""

    _lost = False

    def write(self, data: object) -> int:
        try:
            return len(data) if self._lost else super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if self.fileno() == 2:
                return len(data)  # type: ignore[arg-type]
            self._lost = True  # Python writes what is left once more at the end
            raise SurroundingsError(f"stdout cannot be written: {error.strerror}.") from None


def prepare() -> None:
    """Make this process fit to run a verb; `SurroundingsError` when it may open too few files."""
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # or the next file would take its place; to write to stdout fails, as it should
    for name in [name for name, value in os.environ.items() if name.startswith("HF_") and not value]:
        del os.environ[name]  # huggingface_hub takes an empty variable for its value
    codecs.register_error("edge-phi3", _encodable)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        usual = getattr(sys, name)
        raw = io.BufferedWriter(_Stream(descriptor, "w", closefd=False))
        encoding = usual.encoding if usual else "utf-8"
        setattr(sys, name, io.TextIOWrapper(raw, encoding, "edge-phi3", line_buffering=descriptor == 2 or os.isatty(1)))
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGBUS), _ON_BUS_ERROR)
    # Of its heaps, glibc gives back the end of the first alone: see `edge_phi3.system_resources.give_back_memory`.
    getattr(libc, "mallopt", lambda *_: 0)(_M_ARENA_MAX, 1)
    if (most := may_open(_DESCRIPTORS)) < _DESCRIPTORS:
        raise SurroundingsError(f"Only {most} files may be open here, and {_DESCRIPTORS} must: raise `ulimit -n`.")


def may_open(files: int) -> int:
    """Let this process have so many files open at once, as far as it may; return how many it may have, or `files`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return files if soft == resource.RLIM_INFINITY else min(soft, files)


def sentence_of(error: Exception) -> str:
    """Return what to say of an error that nobody has foreseen."""
    if isinstance(error, EdgePhi3Error):
        return str(error)
    if isinstance(error, MemoryError):
        return "There is not enough memory for this."
    if isinstance(error, OSError) and error.strerror:
        hint = " Raise `ulimit -n`." if error.errno == errno.EMFILE else ""
        return f"{f'{os.fsdecode(error.filename)}: ' if error.filename else ''}{error.strerror}.{hint}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _PACKAGE in Path(frame.filename).parents]
    places = " < ".join(f"{Path(frame.filename).relative_to(_PACKAGE)}:{frame.lineno}" for frame in frames[-3:][::-1])
    return f"This should not have happened: {error!r:.500} ({places}). Please report it, with what led to it."


def _encodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write bytes of a path that are no text as they are, and what an encoding lacks as an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _end(_number: int) -> None:
    """End the process with a sentence where a page of a mapped file is gone; what was computing cannot go on."""
    os.write(2, _CUT_SHORT)
    os._exit(1)


_CUT_SHORT = (
    b"edge-phi3: A file was cut short while it was in use, and what was read from it is gone. Start again, and replace"
    b" files by renaming new ones over them.\n"
)
_ON_BUS_ERROR = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)  # for as long as the process lives
