"""Lets engines live through random scenarios by the ten thousand, on contexts that compute nothing.

    python -m tests.support.fuzz --scenarios 50000 --jobs 2

Each scenario comes from one number; what fails is shrunk and printed as JSON, as it can be pasted into
``tests/engine/failed_once.json``. The end says how many scenarios met what, since a fuzz that never preempts proves
nothing. It exits with 1 when one failed.
"""

import argparse
import contextlib
import multiprocessing
import random
import secrets
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import msgspec
from msgspec.structs import replace

from tests.support.clients import Client
from tests.support.lives import ADMISSION, Life, check_admissions, live
from tests.support.scenario_maker import random_scenario
from tests.support.scenarios import Scenario

PATIENCE = 20.0
"""Seconds of processor time that a scenario may take."""
_MOST_FAILURES = 3
_MANY = 2000
"""Admissions whose share of early preemptions says something."""
_SMALL = 1000
"""Above are seeds, which do not get simpler."""
_WAIT, _TURN = 60.0, 0.0002
"""Seconds that a life in threads may take, which takes a fraction of one, and between two looks of a thread."""


class TooLongError(AssertionError):
    """A scenario has no end."""


class ThreadedLife(Life):
    """A life with a thread for the engine and two for those who ask. Cells are audited after every step.

    What depends on the number of steps that go by is left out, and what would be put into a request that already runs.
    The scenario's steps are times here: what is to happen before a step happens at about that time.
    """

    def __init__(self, scenario: Scenario) -> None:
        asks = []
        for ask in scenario.asks:
            kwargs = {name: value for name, value in ask.kwargs.items() if name != "max_time"}
            fault = None if ask.fault == "choosing" else ask.fault
            asks.append(replace(ask, kwargs=kwargs, timeout=None, fault=fault))
        super().__init__(replace(scenario, asks=tuple(asks), max_queue=256))
        self._asked = threading.Event()
        for client in self.clients:
            _ = client.expected  # so that nothing but asking is left for the threads

    def _run(self) -> Counter[str]:
        with ThreadPoolExecutor(3) as pool:
            engine = pool.submit(self._take_steps)
            asking = [pool.submit(self._ask, self.clients[part::2]) for part in range(2)]
            _, late = wait(asking, _WAIT)
            self._asked.set()
            for future in [*asking, engine]:
                future.result(_WAIT)
            assert not late, "a thread does not come back"
        self._check_end()
        self._count()
        return self.met

    def _take_steps(self) -> None:
        stop_at, until = self.scenario.stop_at, time.monotonic() + _WAIT
        while not self._asked.is_set() or self.core.in_flight:
            assert time.monotonic() < until, "the engine takes no end of steps"
            if stop_at is not None and self.steps >= stop_at:
                self.core.stop("The service is stopping.")
                self.stopped = True
                return
            if not self.core.in_flight:
                time.sleep(_TURN)
                continue
            if not self._take_step():
                self.core.stop("The engine is broken.")
                self.stopped = True
                return
            self.now += 1.0
            self._check_cells()

    def _ask(self, clients: list[Client]) -> None:
        chance = random.Random(len(clients))
        for client in sorted(clients, key=lambda client: client.ask.arrives):
            time.sleep(chance.random() * _TURN * 5)
            client.submit(self.core)
            if client.accepted and client.ask.leaves is not None:
                time.sleep(chance.random() * _TURN * client.ask.leaves)
                assert client.running is not None
                if not client.ended:
                    client.cancelled = True
                    self.core.cancel(client.running)


def live_in_threads(scenario: Scenario) -> Counter[str]:
    return ThreadedLife(scenario).run()


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
    """Return in which way a scenario fails, by the kind of the error and where it is raised; None if it does not."""
    try:
        with time_limit():
            live(scenario)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, TooLongError) else f" in {frame.name}, line {frame.lineno}"
        return f"{type(error).__name__}{where}"
    return None


def _live(numbered: tuple[int, bool]) -> tuple[Counter[str], str]:
    seed, threads = numbered
    try:
        with time_limit():
            return (live_in_threads if threads else live)(random_scenario(seed)), ""
    except Exception:  # noqa: BLE001 - it is printed
        way = "fails in threads" if threads else "fails"
        return Counter(), f"Scenario {seed} {way}.\n{traceback.format_exc()}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=int, default=1000, help="how many, in one thread each")
    parser.add_argument("--real-thread", type=int, default=0, help="how many more, with a thread for the engine")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, help="the number of the first scenario (default: a random one)")
    arguments = parser.parse_args()
    first = secrets.randbits(40) if arguments.seed is None else arguments.seed
    total = arguments.scenarios + arguments.real_thread
    print(f"scenarios {first} to {first + total - 1}", file=sys.stderr)
    numbers = [(first + place, place >= arguments.scenarios) for place in range(total)]
    met: Counter[str] = Counter()
    failed: list[int] = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        lived = zip(numbers, pool.imap(_live, numbers, chunksize=25), strict=True)
        for done, ((seed, threads), (part, story)) in enumerate(lived, 1):
            met.update(part)
            if story:
                failed.append(seed)
                print(story)
                if not threads:
                    simplest = msgspec.json.encode(shrink(random_scenario(seed), failure_of)).decode()
                    print(f"The simplest that fails so:\n\n{simplest}\n")
            if done % 1000 == 0:
                print(f"{done} of {total}, {len(failed)} failed", file=sys.stderr)
            if len(failed) >= _MOST_FAILURES:
                break
        pool.terminate()
    print("".join(f"{count:8} {kind}\n" for kind, count in met.most_common()), end="")
    if met[ADMISSION] > _MANY:
        check_admissions(met)
    sys.exit(1 if failed else 0)


def shrink(scenario: Scenario, failure: Callable[[Scenario], str | None], *, seconds: float = 60.0) -> Scenario:
    """Return a scenario that fails as another does, and none of whose simpler forms does, as `failure` tells."""
    wanted, until = failure(scenario), time.monotonic() + seconds
    candidates = _simpler(scenario)
    while time.monotonic() < until and (simpler := next(candidates, None)) is not None:
        if failure(simpler) == wanted:
            scenario, candidates = simpler, _simpler(simpler)
    return scenario


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    for value in _smaller(msgspec.to_builtins(scenario)):
        with contextlib.suppress(msgspec.ValidationError):
            yield msgspec.convert(value, Scenario)


def _smaller(value: Any) -> Iterator[Any]:
    """Yield what is one thing simpler: without a part, the largest first, or with a smaller one."""
    match value:
        case dict():
            for gone in value:
                yield {name: part for name, part in value.items() if name != gone}
            for name, part in value.items():
                yield from (value | {name: smaller} for smaller in _smaller(part))
        case list():
            for size in sorted({len(value) // 2, len(value) // 4, 1} - {0}, reverse=True):
                for first in range(0, len(value), size):
                    yield value[:first] + value[first + size :]
            for place, part in enumerate(value):
                if not isinstance(part, int):
                    yield from ([*value[:place], smaller, *value[place + 1 :]] for smaller in _smaller(part))
        case int() if 0 < value < _SMALL:
            yield from sorted({value // 2, value - 1})


if __name__ == "__main__":
    main()
