"""One HTTP exchange: what is known about it while it is answered, and a client that leaves before."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast

from litestar.types import Receive, Scope

from edge_phi3.api.errors import ClientDisconnectedError
from edge_phi3.pipeline import GenerationOutput


@dataclass(slots=True)
class Exchange:
    """What is known about a request while it is answered.

    Attributes:
        request_id: taken from ``X-Request-Id`` when that is a plain word, made here otherwise.
        started: the monotonic time of its arrival.
        status: the status code sent, 0 before.
        error: the class of the error that ended it, also when it ended a stream that had begun.
        output: what was generated.
        prompt: the request's text, kept only when prompts are logged.
    """

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    error: str | None = None
    output: GenerationOutput | None = None
    prompt: str | None = None


def exchange_of(scope: Scope) -> Exchange:
    """Return the exchange that an ASGI scope belongs to."""
    return cast("Exchange", scope["state"]["exchange"])


@contextlib.asynccontextmanager
async def cancelled_when_client_leaves(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block as soon as the client closes its connection. The request's body has been read.

    Raises:
        ClientDisconnectedError: instead of the block's `asyncio.CancelledError`, when that was the reason.
    """
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientDisconnectedError("The client left before its answer was ready.") from None
        raise
    finally:
        watcher.cancel()
