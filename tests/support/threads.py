"""Lives of an engine whose steps are taken by a thread of their own, while other threads ask and leave."""

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait

from msgspec.structs import replace

from tests.support.clients import Client
from tests.support.lives import Life
from tests.support.scenarios import Scenario

_PATIENCE = 60.0
"""Seconds that a life may take; it takes a fraction of one."""
_TURN = 0.0002
"""Seconds between two looks of a thread."""


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
            _, late = wait(asking, _PATIENCE)
            self._asked.set()
            for future in [*asking, engine]:
                future.result(_PATIENCE)
            assert not late, "a thread does not come back"
        self._check_end()
        self._count()
        return self.met

    def _take_steps(self) -> None:
        stop_at, until = self.scenario.stop_at, time.monotonic() + _PATIENCE
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
