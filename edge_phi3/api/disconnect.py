"""A client that leaves ends its request: nothing is generated for nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from litestar.types import Receive

from edge_phi3.api.errors import ClientDisconnectedError


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
