"""Steps that are done once: each leaves a file behind, and a later run goes on where an earlier one stopped."""

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_phi3.files import atomic_output


class NotMeasured(Exception):  # noqa: N818 - it is an outcome of a step, not an error
    """This machine lacks what the step measures or compares with; the message says what."""


class OutOfTime(Exception):  # noqa: N818 - it ends the run in good order
    """The time limit came before the work was done."""


class Record(msgspec.Struct, kw_only=True):
    """What a step left behind.

    Attributes:
        name: ``part.step``.
        seconds: how long it took.
        result: what it gave, or None.
        missing: why it was not measured, or None.
        failure: the error that ended it, or None.
    """

    name: str
    seconds: float
    result: Any = None
    missing: str | None = None
    failure: str | None = None

    @property
    def done(self) -> bool:
        """Whether it need not be run again."""
        return self.missing is None and self.failure is None


class Steps:
    """The steps of a run.

    Args:
        folder: where their records lie.
        limit: seconds from now after which no step begins.

    Attributes:
        failed: names of the steps that failed in this run.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self._folder = folder
        self._end = time.monotonic() + limit
        self._ran = 0
        self.failed: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def time_left(self) -> float:
        """Seconds until the limit."""
        return self._end - time.monotonic()

    def records(self) -> dict[str, Record]:
        """Return the records of all steps that ever ran, by name."""
        paths = sorted(self._folder.glob("*.json"))
        found = [msgspec.json.decode(path.read_bytes(), type=Record) for path in paths]
        return {record.name: record for record in found}

    def result(self, name: str) -> Any:
        """Return what a step gave, or None when it is not done."""
        path = self._folder / f"{name}.json"
        return msgspec.json.decode(path.read_bytes(), type=Record).result if path.is_file() else None

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a step unless it is done, and return its result; None when it failed or could not be measured.

        Args:
            name: ``part.step``.
            work: gives what is recorded, which JSON can hold.

        Raises:
            OutOfTime: the limit has passed, the step would not end before it as far as others of its part tell, or the
                step says so.
        """
        path = self._folder / f"{name}.json"
        if path.is_file():
            record = msgspec.json.decode(path.read_bytes(), type=Record)
            if record.done:
                return record.result
        if self.time_left <= self._expected(name):
            raise OutOfTime(f"The time limit came before {name}.")
        _say(f"{name} ...")
        started = time.monotonic()
        record = Record(name=name, seconds=0.0)
        try:
            record.result = msgspec.to_builtins(work())
        except NotMeasured as reason:
            record.missing = str(reason)
        except OutOfTime:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - one failed step does not end the others
            record.failure = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            self.failed.append(name)
        record.seconds = round(time.monotonic() - started, 3)
        with atomic_output(path, force=True) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        outcome = f"not measured: {record.missing}" if record.missing else record.failure or "done"
        _say(f"{name}: {outcome} ({record.seconds:.1f} s)")
        self._ran += 1
        return record.result

    def _expected(self, name: str) -> float:
        """Return the seconds of the longest step of the same part; 0 for a run's first step, so that it moves on."""
        part = name.partition(".")[0]
        known = [record.seconds for record in self.records().values() if record.name.startswith(f"{part}.")]
        return max(known, default=0.0) if self._ran else 0.0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
