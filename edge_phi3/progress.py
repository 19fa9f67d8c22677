"""How far long work is: one protocol, drawn as bars, written as lines, or kept quiet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Step(Protocol):
    """One step of the work, such as the download of one file; counted in bytes."""

    def update(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Report how far the step is.

        Args:
            done: bytes that are done, from the step's beginning; may fall when a part is done again.
            total: bytes of the whole step, when they are known only now.
            detail: what is being worked on, such as the name of a tensor.
        """


class ProgressReporter(Protocol):
    """Takes the steps of long work, one after another."""

    def step(self, title: str, total: int | None = None) -> AbstractContextManager[Step]:
        """Begin a step; it ends with the context, in failure when an exception leaves it.

        Args:
            title: what is done to what, such as ``Downloading model.safetensors``.
            total: bytes of the whole step, None when not known yet.
        """

    def note(self, sentence: str) -> None:
        """Report something that is not a step."""


class LineProgress:
    """Writes lines, for logs and services: when a step begins, now and then while it lasts, and when it ends."""

    def __init__(self, say: Callable[[str], None], *, interval: float = 10.0) -> None:
        """Write to `say`, about one step at most every `interval` seconds between its first and last line."""
        self._say = say
        self._interval = interval

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """Begin a step: one line now, one at the end."""
        self._say(f"{title}{f' ({decimal(total)})' if total else ''}.")
        started = time.monotonic()
        yield _LineStep(self._say, title, total, self._interval)
        self._say(f"{title}: done in {time.monotonic() - started:.1f} s.")

    def note(self, sentence: str) -> None:
        """Write the sentence as a line."""
        self._say(sentence)


class SilentProgress(LineProgress):
    """Writes nothing."""

    def __init__(self) -> None:
        super().__init__(lambda _line: None)


class RichProgress(Progress):
    """Draws one bar for each step; enter it as a context manager.

    On a stderr that is no terminal it draws nothing but the notes; use `LineProgress` there.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console`, by default stderr."""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console or Console(stderr=True),
        )

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """Begin a step: a new bar, which stays when the step is done and is taken away when it fails."""
        bar = self.add_task(title, total=total, detail="")
        try:
            yield _RichStep(self, bar)
        except BaseException:
            self.remove_task(bar)
            raise
        self.update(bar, detail="")

    def note(self, sentence: str) -> None:
        """Print the sentence above the bars."""
        self.console.print(sentence, markup=False, highlight=False)


@contextlib.contextmanager
def stderr_progress() -> Iterator[ProgressReporter]:
    """Yield bars when stderr is a terminal, and lines on stderr when it is not."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield LineProgress(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
        return
    with RichProgress(console) as bars:
        yield bars


class _LineStep:
    def __init__(self, say: Callable[[str], None], title: str, total: int | None, interval: float) -> None:
        self._say = say
        self._title = title
        self._total = total
        self._interval = interval
        self._next = time.monotonic() + interval

    def update(self, done: int, total: int | None = None, detail: str = "") -> None:  # noqa: ARG002 (the protocol's)
        self._total = self._total if total is None else total
        now = time.monotonic()
        if now >= self._next and done != self._total:
            self._next = now + self._interval
            of = "" if self._total is None else f" of {decimal(self._total)}"
            percent = f" ({100 * done // self._total} %)" if self._total else ""
            self._say(f"{self._title}: {decimal(done)}{of}{percent}.")


class _RichStep:
    def __init__(self, bars: Progress, bar: TaskID) -> None:
        self._bars = bars
        self._bar = bar

    def update(self, done: int, total: int | None = None, detail: str = "") -> None:
        self._bars.update(self._bar, completed=done, total=total, detail=detail)
