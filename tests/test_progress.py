"""Progress as lines, as bars, and as nothing."""

import contextlib
import io

import pytest
from rich.console import Console

from edge_phi3 import progress as module
from edge_phi3.progress import LineProgress, RichProgress, SilentProgress, stderr_progress


def test_lines_tell_the_beginning_the_way_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("edge_phi3.progress.time.monotonic", lambda: now)
    lines: list[str] = []
    with LineProgress(lines.append, interval=10).step("Downloading a.gguf", 4_000_000) as step:
        for done in range(0, 4_000_001, 100_000):
            step.update(done)
            now += 1
    assert lines == [
        "Downloading a.gguf (4.0 MB).",
        "Downloading a.gguf: 1.0 MB of 4.0 MB (25 %).",
        "Downloading a.gguf: 2.0 MB of 4.0 MB (50 %).",
        "Downloading a.gguf: 3.0 MB of 4.0 MB (75 %).",
        "Downloading a.gguf: done in 41.0 s.",
    ]


def test_lines_do_without_a_total_and_a_failed_step_is_not_told_as_done() -> None:
    lines: list[str] = []
    with contextlib.suppress(ValueError), LineProgress(lines.append, interval=0).step("Reading") as step:
        step.update(1000)
        step.update(2000, 8000)
        raise ValueError("no")
    assert lines == ["Reading.", "Reading: 1.0 kB.", "Reading: 2.0 kB of 8.0 kB (25 %)."]


def test_stderr_gets_bars_when_it_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=160)
    monkeypatch.setattr(module, "Console", lambda **_: console)
    with stderr_progress() as shown:
        assert isinstance(shown, RichProgress)
        with shown.step("Quantising x", 2000) as step:
            step.update(500, detail="blk.0.ffn_up.weight")
            shown.bars.refresh()
            step.update(1500, 3000)
        shown.note("Half [way] there.")
        with pytest.raises(ValueError, match="no"), shown.step("Converting x", 10):
            raise ValueError("no")
        assert [task.description for task in shown.bars.tasks] == ["Quantising x"]
    for text in ("Quantising x", "0.5/2.0 kB", "1.5/3.0 kB", "blk.0.ffn_up.weight", "Half [way] there."):
        assert text in written.getvalue()


def test_stderr_gets_lines_when_it_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    note = "A note that is longer than a line of eighty columns, if this were one of those terminals."
    with stderr_progress() as reporter, reporter.step("Converting [x]"):
        reporter.note(note)
    out, err = capsys.readouterr()
    first, second, third = err.splitlines()
    assert (out, first, second) == ("", "Converting [x].", note)
    assert third.startswith("Converting [x]: done in ")


def test_silence_but_for_sentences_on_where_the_work_is(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    reporter = SilentProgress()
    for say in (reporter.say, said.append):
        reporter.say = say
        with reporter.step("Converting") as step:
            step.update(1)
            step.update(2, 8, "detail")
        reporter.note("Nobody hears this.")
    assert said == ["Converting.", "Converting.", "Converting: 25 %."]
    assert capsys.readouterr() == ("", "")
