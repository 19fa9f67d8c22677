"""Lets engines live through random scenarios by the ten thousand, on contexts that compute nothing.

    python -m tests.support.fuzz --scenarios 50000 --jobs 2

Each scenario comes from one number; what fails is shrunk and printed as it can be pasted into a test. The end says how
many scenarios met what, since a fuzz that never preempts proves nothing. It exits with 1 when one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import secrets
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tests.support.lives import KINDS, live
from tests.support.scenario_maker import random_scenario
from tests.support.scenarios import Scenario
from tests.support.shrinking import shrink
from tests.support.threads import live_in_threads

PATIENCE = 20.0
"""Seconds of processor time that a scenario may take."""
_CHUNK = 25


class Failed(NamedTuple):
    """A scenario that failed: its number, the whole story, and whether it lived in threads."""

    seed: int
    story: str
    threads: bool


class TooLongError(AssertionError):
    """A scenario has no end."""


def main() -> None:
    """Run as many scenarios as are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=int, default=1000, help="how many, in one thread each")
    parser.add_argument("--real-thread", type=int, default=0, help="how many more, with a thread for the engine")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, help="the number of the first scenario (a fresh one)")
    parser.add_argument("--failures", type=int, default=3, help="stop after so many")
    arguments = parser.parse_args()
    first = secrets.randbits(40) if arguments.seed is None else arguments.seed
    total = arguments.scenarios + arguments.real_thread
    sys.stderr.write(f"scenarios {first} to {first + total - 1}\n")
    numbers = [(first + place, place >= arguments.scenarios) for place in range(total)]
    chunks = [numbers[place : place + _CHUNK] for place in range(0, total, _CHUNK)]
    met, failures = _run(chunks, arguments.jobs, arguments.failures, total)
    told: set[str | None] = set()
    for failed in failures:
        sys.stdout.write(_told(failed, told))
    sys.stdout.write("".join(f"{met[kind]:8} {kind}\n" for kind in ("scenarios", *KINDS)))
    sys.exit(1 if failures else 0)


def _run(chunks: list[list[tuple[int, bool]]], jobs: int, most: int, total: int) -> tuple[Counter[str], list[Failed]]:
    met: Counter[str] = Counter()
    failures: list[Failed] = []
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for part, failed in pool.imap_unordered(_live_all, chunks):
            met.update(part)
            failures += failed
            spent = time.monotonic() - start
            sys.stderr.write(f"\r{met['scenarios']} of {total}, {len(failures)} failed, {spent:.0f} s ")
            sys.stderr.flush()
            if len(failures) >= most:
                break
        pool.terminate()
    sys.stderr.write("\n")
    return met, failures


def _live_all(numbers: list[tuple[int, bool]]) -> tuple[Counter[str], list[Failed]]:
    met: Counter[str] = Counter()
    failed: list[Failed] = []
    for seed, threads in numbers:
        met["scenarios"] += 1
        try:
            with time_limit():
                met.update(live_in_threads(random_scenario(seed)) if threads else live(random_scenario(seed)))
        except Exception:  # noqa: BLE001 - it is told
            failed.append(Failed(seed, traceback.format_exc(), threads))
    return met, failed


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise `TooLongError` when what is inside takes too much processor time. In the main thread only."""

    def stop(_signal: int, _frame: object) -> None:
        raise TooLongError(f"The scenario takes more than {PATIENCE:g} s of processor time.")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def failure_of(scenario: Scenario) -> str | None:
    """Say in which way a scenario fails, or None: by the kind of the error and where it is raised."""
    try:
        with time_limit():
            live(scenario)
    except Exception as error:  # noqa: BLE001 - it is told
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, TooLongError) else f" in {frame.name}, line {frame.lineno}"
        return f"{type(error).__name__}{where}"
    return None


def _told(failed: Failed, told: set[str | None]) -> str:
    """Return the story of a failure, with a simple scenario when it is the first of its kind."""
    if failed.threads:
        return f"Scenario {failed.seed} fails in threads.\n{failed.story}\n"
    scenario = random_scenario(failed.seed)
    kind = failure_of(scenario)
    if kind in told:
        return f"Scenario {failed.seed} fails as one above: {kind}.\n"
    told.add(kind)
    simple = shrink(scenario, failure_of)
    return f"Scenario {failed.seed} fails.\n{failed.story}\nThe simplest that fails so:\n\n{simple!r}\n\n"


if __name__ == "__main__":
    main()
