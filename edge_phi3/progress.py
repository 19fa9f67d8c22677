"""How far long work is: steps that are drawn as bars, written as lines, or kept quiet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class Step:
    """A step, such as ``Downloading model.safetensors``; `total` is in bytes, `detail` is what is worked on."""

    def __init__(self, title: str, total: int | None, changed: Callable[[Step], None]) -> None:
        self.title, self.total = title, total
        self.done, self.detail = 0, ""
        self._changed = changed

    def update(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Report how far the step is, from its beginning; `done` may fall when a part is done again."""
        self.done, self.detail = done, detail
        self.total = self.total if total is None else total
        self._changed(self)


class ProgressReporter:
    """Takes the steps of long work, one after another; this one shows nothing.

    `say` is called with a sentence on where the work is, each time that it changes; what it raises ends the work.
    """

    say: Callable[[str], None] = staticmethod(lambda _sentence: None)

    @contextlib.contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Step]:
        """Begin a step; it ends with the context, in failure when an exception leaves it."""
        step = Step(title, total, self._changed)
        self.say(f"{title}.")
        self._begun(step)
        whole = False
        try:
            yield step
            whole = True
        finally:
            self._ended(step, whole=whole)

    def _changed(self, step: Step) -> None:
        self.say(f"{step.title}: {100 * step.done // step.total} %." if step.total else f"{step.title}.")
        self._show(step)

    def _begun(self, step: Step) -> None:
        """Show a step that begins."""

    def _show(self, step: Step) -> None:
        """Show how far the step is."""

    def _ended(self, step: Step, *, whole: bool) -> None:
        """Show that the step is done, or that it failed."""

    def note(self, sentence: str) -> None:
        """Report something that is not a step."""


SilentProgress = ProgressReporter


class LineProgress(ProgressReporter):
    """Writes lines, for logs and services: between those of one step, `interval` seconds at least, its ends apart."""

    def __init__(self, write: Callable[[str], None], *, interval: float = 10.0) -> None:
        self._write = write
        self._interval = interval

    def note(self, sentence: str) -> None:
        """Write the sentence as a line."""
        self._write(sentence)

    def _begun(self, step: Step) -> None:
        self._write(f"{step.title}{f' ({decimal(step.total)})' if step.total else ''}.")
        self._started = time.monotonic()
        self._next = self._started + self._interval

    def _show(self, step: Step) -> None:
        now = time.monotonic()
        if now >= self._next and step.done != step.total:
            self._next = now + self._interval
            of = f" of {decimal(step.total)} ({100 * step.done // step.total} %)" if step.total else ""
            self._write(f"{step.title}: {decimal(step.done)}{of}.")

    def _ended(self, step: Step, *, whole: bool) -> None:
        if whole:
            self._write(f"{step.title}: done in {time.monotonic() - self._started:.1f} s.")


class RichProgress(ProgressReporter):
    """Draws one bar for each step on a terminal. A bar stays when its step is done, and goes when it fails."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        rest = (TimeRemainingColumn(), TextColumn("[dim]{task.fields[detail]}"))
        self.bars = Progress(*columns, *rest, console=console)

    def _begun(self, step: Step) -> None:
        self._bar = self.bars.add_task(step.title, total=step.total, detail="")

    def _show(self, step: Step) -> None:
        self.bars.update(self._bar, completed=step.done, total=step.total, detail=step.detail)

    def _ended(self, step: Step, *, whole: bool) -> None:  # noqa: ARG002 - the bar knows its step
        if whole:
            self.bars.update(self._bar, detail="")
        else:
            self.bars.remove_task(self._bar)

    def note(self, sentence: str) -> None:
        """Print the sentence above the bars."""
        self.bars.console.print(sentence, markup=False, highlight=False)


@contextlib.contextmanager
def stderr_progress(lines: LineProgress | None = None) -> Iterator[ProgressReporter]:
    """Yield bars when stderr is a terminal, and when it is not `lines`, by default on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        bars = RichProgress(console)
        with bars.bars:
            yield bars
    else:
        yield lines or LineProgress(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
