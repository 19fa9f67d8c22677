"""Lives of an engine whose steps are taken by a thread of their own, while other threads ask and leave."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from edge_phi3.llama import DecodeFailedError
from tests.support.clients import Client
from tests.support.lives import Life
from tests.support.scenarios import Scenario

_PATIENCE = 60.0
"""Seconds that a life may take; it takes a fraction of one."""
_TURN = 0.0002
"""Seconds between two looks of a thread."""


class ThreadedLife(Life):
    """A life with a thread for the engine and two for those who ask. Books are checked after every step.

    Args:
        scenario: which. Its steps are times here: what is to happen before a step happens at about that time.
        options: as `make_core` takes them.
    """

    def __init__(self, scenario: Scenario, **options: object) -> None:
        super().__init__(scenario, **options)
        self._over = threading.Event()
        self._errors: list[BaseException] = []
        for client in self.clients:
            _ = client.expected  # so that nothing but asking is left for the threads

    def _run(self) -> Counter[str]:
        """Live to the end."""
        threads = [threading.Thread(target=self._guarded, args=(self._take_steps,), daemon=True)]
        threads += [
            threading.Thread(target=self._guarded, args=(self._ask, self.clients[part::2]), daemon=True)
            for part in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join(_PATIENCE)
        until = time.monotonic() + _PATIENCE
        while not self._errors and time.monotonic() < until and (self.core.in_flight or self._waited_for()):
            time.sleep(_TURN)
        self._over.set()
        threads[0].join(_PATIENCE)
        if self._errors:
            raise self._errors[0]
        assert not any(thread.is_alive() for thread in threads), "a thread does not come back"
        self._check_end()
        self._count()
        return self.met

    def _waited_for(self) -> bool:
        return any(client.in_flight for client in self.clients)

    def _guarded(self, target: Callable[..., None], *arguments: object) -> None:
        try:
            target(*arguments)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._errors.append(error)
            self._over.set()

    def _take_steps(self) -> None:
        stop_at = self.scenario.stop_at
        while not self._over.is_set():
            if stop_at is not None and self.steps >= stop_at:
                self.core.stop("The service is stopping.")
                self.stopped = True
                return
            if not self.core.in_flight:
                time.sleep(_TURN)
                continue
            try:
                self.core.step()
            except DecodeFailedError:
                assert any(context.broken for context in self.contexts), "a context works, but the engine is broken"
                self.core.stop("The engine is broken.")
                self.stopped = self.broken = True
                return
            self.steps += 1
            self.now += 1.0
            self._check_books()

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

    def _check_end(self) -> None:
        if not self.stopped:
            while self.core.in_flight:  # those who left are found gone in a step
                self.core.step()
        super()._check_end()


def _for_threads(scenario: Scenario) -> Scenario:
    asks = [
        dataclasses.replace(
            ask,
            kwargs={name: value for name, value in ask.kwargs.items() if name != "max_time"},
            timeout=None,
            fault=None if ask.fault == "choosing" else ask.fault,
        )
        for ask in scenario.asks
    ]
    return dataclasses.replace(scenario, asks=tuple(asks), max_queue=256)


def live_in_threads(scenario: Scenario, **options: object) -> Counter[str]:
    """Live a scenario with a real thread for the engine.

    What depends on the number of steps that go by is left out, and what would be put into a request that already runs.

    Raises:
        AssertionError: the engine did what it must not do.
    """
    return ThreadedLife(_for_threads(scenario), **options).run()
