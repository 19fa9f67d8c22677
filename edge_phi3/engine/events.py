"""From the engine's thread to whoever waits in an event loop."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from edge_phi3.engine.sequence import Event, TokensEvent

Mailbox = asyncio.Queue[Event]


class EventBatcher:
    """Events that wait to be delivered, each event loop's by one call. From any thread.

    Each delivery takes a core from llama.cpp: to wake the event loop, write to a socket and wake the client took 0.26
    ms of processor time for one stream beside a 0.65 B model. At 25 deliveries a second a client had 2.5 % fewer tokens
    than without streaming. So tokens wait for those after them, within limits; a request's first and last do not.

    A token may wait for `interval` seconds; one that would wait for longer, were it not delivered before the next step,
    is not kept back. 0 delivers each token by itself. `urgent` is whether what waits is to be delivered at once.
    """

    def __init__(self, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.urgent = False
        self._interval = interval
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.AbstractEventLoop, dict[Mailbox, list[Event]]] = {}
        self._flushed = self._last_step = 0.0

    def flush_if_due(self) -> None:
        """Deliver what waits when that is due; to be called once a step."""
        now = self._clock()
        step, self._last_step = now - self._last_step, now
        if self.urgent or now + step - self._flushed >= self._interval:
            self.flush()

    def post(self, loop: asyncio.AbstractEventLoop, mailbox: Mailbox, event: Event) -> None:
        """Keep an event for the next `flush`; tokens join those that wait already."""
        with self._lock:
            waiting = self._waiting.setdefault(loop, {}).setdefault(mailbox, [])
            if not isinstance(event, TokensEvent):
                self.urgent = True
            elif waiting and isinstance(before := waiting[-1], TokensEvent):
                before.tokens.extend(event.tokens)
                before.logprobs.extend(event.logprobs)
                return
            waiting.append(event)

    def flush(self) -> None:
        """Deliver all that waits."""
        with self._lock:
            self.urgent, self._flushed = False, self._clock()
            boxes, self._waiting = self._waiting, {}
        for loop, mailboxes in boxes.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_deliver, mailboxes)


def _deliver(mailboxes: dict[Mailbox, list[Event]]) -> None:
    for mailbox, events in mailboxes.items():
        for event in events:
            mailbox.put_nowait(event)
