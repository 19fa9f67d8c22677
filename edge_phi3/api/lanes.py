"""Where a request is prepared: the one place where its body's size is weighed.

What a small body asks for is done at once, on the event loop. Everything else is done by a few threads, in lanes, so
that neither the event loop nor smaller bodies wait for the largest: parsing, chat templates, tokens, schemas.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future as Work
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final, TypeVar

from litestar import Request

from edge_phi3.api.errors import NotReadyError
from edge_phi3.api.exchange import cancelled_when_client_leaves
from edge_phi3.engine.errors import DeadlineExceededError

Result = TypeVar("Result")

_STOPPING: Final = "The service is stopping."

LONG: Final = 32 << 10
LONGEST: Final = 512 << 10
"""Bytes of a body that is no longer prepared on the event loop, where it would take ten to twenty milliseconds on two
cores of an EPYC, and of one that goes into the lane of the largest."""
THREADS: Final = {"long": 4, "longest": 1, "foreign": 1}
"""How many bodies each lane prepares at once; in the last are those for chat templates that run apart."""


class Lanes:
    """The threads of one service; `timeout` is the most seconds that a request may wait and work, 0 for no limit."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lanes = {name: ThreadPoolExecutor(count, f"{name} bodies") for name, count in THREADS.items()}
        self._running: set[Work[Any]] = set()
        self._closed = False

    async def prepare(
        self,
        request: Request[Any, Any, Any],
        body: bytes,
        work: Callable[[], Result],
        *,
        slow: bool = False,
        foreign: bool = False,
    ) -> Result:
        """Return what `work` returns; `slow` work is none for the event loop, `foreign` work has its own lane.

        What nobody waits for any more is not begun.

        Raises:
            ClientDisconnectedError: the client left.
            DeadlineExceededError: it took too long.
            NotReadyError: the service is stopping.
        """
        if len(body) < LONG and not slow and not foreign:
            return work()
        if self._closed:
            raise NotReadyError(_STOPPING)
        lane = self._lanes["longest" if len(body) >= LONGEST else "foreign" if foreign else "long"]
        running = lane.submit(work)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        try:
            async with cancelled_when_client_leaves(request.receive), asyncio.timeout(self._timeout or None):
                return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            raise NotReadyError(_STOPPING) from None
        except TimeoutError:
            raise DeadlineExceededError(
                f"The request was not prepared within {self._timeout:g} s (--request-timeout)."
            ) from None

    def close(self, patience: float) -> bool:
        """Begin nothing more, and wait for what runs; return whether it has ended within so many seconds."""
        self._closed = True
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)
        return not wait(list(self._running), patience).not_done
