"""From a scenario that fails to a small one that fails in the same way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tests.support.scenarios import Ask, Scenario

_Part = TypeVar("_Part", Ask, Scenario)
_ESSENTIAL = {"cells", "max_tokens"}
"""Fields that are shrunk in a way of their own."""


def shrink(scenario: Scenario, failure: Callable[[Scenario], str | None], *, seconds: float = 60.0) -> Scenario:
    """Return a scenario that fails as another does, and none of whose simpler forms does.

    Args:
        scenario: one that fails.
        failure: returns the way in which a scenario fails, or None when it does not.
        seconds: how long to look for simpler ones.
    """
    wanted, until = failure(scenario), time.monotonic() + seconds
    candidates = _simpler(scenario)
    while time.monotonic() < until and (simpler := next(candidates, None)) is not None:
        if failure(simpler) == wanted:
            scenario, candidates = simpler, _simpler(simpler)
    return scenario


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    """Yield the scenarios that are one thing simpler, the greatest changes first."""
    replace, asks = dataclasses.replace, scenario.asks
    for size in sorted({len(asks) // 2, len(asks) // 4, 1} - {0, len(asks)}, reverse=True):
        for first in range(0, len(asks), size):
            yield replace(scenario, asks=_without(asks, range(first, first + size)))
    if len(scenario.cells) > 1:
        yield replace(scenario, cells=scenario.cells[1:], max_tokens=None)
    yield from _defaults(scenario)
    for number, ask in enumerate(asks):
        for simpler in _simpler_asks(ask):
            yield replace(scenario, asks=(*asks[:number], simpler, *asks[number + 1 :]))


def _defaults(part: _Part) -> Iterator[_Part]:
    """Yield what differs in one field, which has its default."""
    for field in dataclasses.fields(part):
        default = field.default
        if default is not dataclasses.MISSING and field.name not in _ESSENTIAL and getattr(part, field.name) != default:
            yield dataclasses.replace(part, **{field.name: default})


def _without(asks: tuple[Ask, ...], gone: range) -> tuple[Ask, ...]:
    """Return the requests but for some; those whose prompts go on from one that is gone stand for themselves."""
    numbers = {old: new for new, old in enumerate(number for number in range(len(asks)) if number not in gone)}
    return tuple(dataclasses.replace(asks[old], after=numbers.get(asks[old].after)) for old in numbers)  # type: ignore[arg-type]


def _simpler_asks(ask: Ask) -> Iterator[Ask]:
    replace, kwargs, size = dataclasses.replace, ask.kwargs, len(ask.prompt)
    yield from _defaults(ask)
    for name in sorted(kwargs.keys() - {"max_length", "max_new_tokens", "do_sample"}):
        yield replace(ask, kwargs={key: value for key, value in kwargs.items() if key != name})
    for less in sorted({size // 2, size // 4, 1} - {0, size}, reverse=True):
        longest = {"max_length": kwargs["max_length"] - less} if "max_length" in kwargs else {}
        yield replace(ask, prompt=ask.prompt[less:], kwargs=kwargs | longest)
    for name, least in (("max_new_tokens", 1), ("num_beams", 2), ("num_return_sequences", 1)):
        value = kwargs.get(name, 0)
        for smaller in (least, value // 2, value - 1):
            if least <= smaller < value:
                yield replace(ask, kwargs=kwargs | {name: smaller})
