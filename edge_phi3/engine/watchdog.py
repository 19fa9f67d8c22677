"""Notices when the engine's thread does not come back from a step."""

import sys
import threading
import time
import traceback
from collections.abc import Callable

_STEPS_TOLERATED = 10
"""How many times the longest step so far a step may take."""
_LOOKS = 60
"""How often the watchdog looks within its time limit."""


class Watchdog:
    """Calls for help when nothing moves for `limit` seconds, and once more after the same time again.

    A step that is merely slow is no stall: the limit is at least ten times the longest step so far. Time in which the
    watchdog itself stood still (SIGSTOP, a suspended machine) does not count.

    `steps` returns a number that changes with every step, or None while no step is due. `stalled` is called with the
    seconds without a step when the limit has passed, `recovered` when a step comes after all, `lost` when the same time
    has passed again. `clock` returns seconds that only grow.
    """

    def __init__(
        self,
        limit: float,
        *,
        steps: Callable[[], int | None],
        stalled: Callable[[float], None],
        recovered: Callable[[], None],
        lost: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._period = limit / _LOOKS
        self._steps, self._clock = steps, clock
        self._stalled, self._recovered, self._lost = stalled, recovered, lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._looked = self._still = self._longest = 0.0
        self._seen: int | None = 0
        self._calls = 0

    def start(self) -> None:
        """Begin to watch."""
        self._seen, self._looked = self._steps(), self._clock()
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self.look()

    def look(self) -> None:
        """Look whether a step came since the last time; called once a period."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, 2 * self._period), now
        steps = self._steps()
        if steps is None or steps != self._seen:
            if self._calls:
                self._calls = 0
                self._recovered()
            elif steps is not None:
                self._longest = max(self._longest, self._still)
            self._seen, self._still = steps, 0.0
            return
        self._still += passed
        limit = max(self._limit, _STEPS_TOLERATED * self._longest)
        if self._still >= limit and self._calls == 0:
            self._calls = 1
            self._stalled(self._still)
        elif self._still >= 2 * limit and self._calls == 1:
            self._calls = 2
            self._lost()


def stacks() -> str:
    """Return where every thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()  # noqa: SLF001 - the documented way
    )
