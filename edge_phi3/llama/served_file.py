"""Notices when a file that is mapped changes under the one who reads it."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_phi3.llama import ModelLoadError

_PERIOD = 0.5
"""Seconds."""


class ServedFiles:
    """Files that must stay as they are. One that another file takes the place of, as by a rename, stays the old one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._stop = threading.Event()
        self._files: list[tuple[Path, int, tuple[int, int]]] = []
        try:
            for path in paths:
                descriptor = os.open(path, os.O_RDONLY)
                self._files.append((path, descriptor, _look(descriptor)))
        except OSError as error:
            self.close()
            raise ModelLoadError(f"The model {error.filename} cannot be read: {error.strerror}.") from error

    def watch(self, changed: Callable[[str], None]) -> None:
        """Look at the files until `close`, in a thread, which calls `changed` once with a sentence on what has."""
        threading.Thread(target=self._run, args=(changed,), name="served-files", daemon=True).start()

    def _run(self, changed: Callable[[str], None]) -> None:
        while not self._stop.wait(_PERIOD):
            for path, descriptor, before in self._files:
                if (now := _look(descriptor)) != before:
                    what = f"cut short to {now[0]} bytes" if now[0] < before[0] else "overwritten"
                    changed(
                        f"The model {path} was {what} while it was served, and what was loaded of it is lost."
                        " Replace models by renaming new files over them, or serve with --no-mmap."
                    )
                    return

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        while self._files:
            os.close(self._files.pop()[1])


def _look(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
