"""From the engine's thread to whoever waits in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time

from edge_phi3.engine.sequence import Event, TokensEvent

Mailbox = asyncio.Queue[Event]

_FLUSH_INTERVAL = 0.040
"""Seconds between two deliveries of streamed tokens at least; a request's first and last tokens do not wait.

Twenty-five pieces a second read as smoothly as film runs, and each delivery takes a core from llama.cpp: to wake the
event loop, write to a socket and wake the client costs about 0.3 ms for each stream, most of it for code and data that
the model's weights have driven out of the caches."""


class Outbox:
    """Events that wait to be delivered, each event loop's by one call. Used by the engine's thread alone."""

    def __init__(self) -> None:
        self.urgent = False
        self._waiting: dict[asyncio.AbstractEventLoop, dict[Mailbox, list[Event]]] = {}
        self._flushed = 0.0

    def flush_if_due(self, now: float) -> None:
        """Deliver what waits when something is urgent, or when the last delivery is long enough ago.

        Args:
            now: seconds of `time.monotonic`.
        """
        if self.is_due(now):
            self.flush()

    def is_due(self, now: float) -> bool:
        """Say whether something is urgent, or the last delivery long enough ago."""
        return self.urgent or now - self._flushed >= _FLUSH_INTERVAL

    def post(self, loop: asyncio.AbstractEventLoop, mailbox: Mailbox, event: Event) -> None:
        """Keep an event for the next `flush`; tokens join those that wait already."""
        mailboxes = self._waiting.get(loop)
        if mailboxes is None:
            mailboxes = self._waiting[loop] = {}
        waiting = mailboxes.get(mailbox)
        if waiting is None:
            waiting = mailboxes[mailbox] = []
        if not isinstance(event, TokensEvent):
            self.urgent = True
        elif waiting and isinstance(before := waiting[-1], TokensEvent):
            before.tokens.extend(event.tokens)
            before.logprobs.extend(event.logprobs)
            return
        waiting.append(event)

    def flush(self) -> None:
        """Deliver all that waits."""
        self.urgent, self._flushed = False, time.monotonic()
        boxes, self._waiting = self._waiting, {}
        for loop, mailboxes in boxes.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_deliver, mailboxes)


def _deliver(mailboxes: dict[Mailbox, list[Event]]) -> None:
    for mailbox, events in mailboxes.items():
        for event in events:
            mailbox.put_nowait(event)
