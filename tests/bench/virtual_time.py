"""An event loop whose clock goes when everybody waits: exact on any machine, and a minute passes in no time."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

_T = TypeVar("_T")


class _Selector(selectors.SelectSelector):
    """Lets time pass instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for ever"
            self.now += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(monkeypatch: pytest.MonkeyPatch, main: Coroutine[Any, Any, _T]) -> _T:
    """Run something in such a loop; `time.perf_counter` is the loop's clock meanwhile."""
    with asyncio.Runner(loop_factory=_Loop) as runner, monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", runner.get_loop().time)
        return runner.run(main)
