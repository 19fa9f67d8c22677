"""Long texts are turned into tokens, or back, beside the event loop: meanwhile it answers others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_LONG = 32 * 1024
"""Bytes of a body that are prepared in ten to twenty milliseconds on two cores of an EPYC. A thread takes a fraction of
a millisecond to be asked, which short texts are spared."""


async def work_on(body: bytes, work: Callable[[], Result]) -> Result:
    """Do what a request's body asks for: at once, or in a thread when the body is long.

    Args:
        body: of the request.
        work: what takes time with the body's length.
    """
    return work() if len(body) < _LONG else await asyncio.to_thread(work)
