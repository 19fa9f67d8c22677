"""From a scenario that fails to a small one that fails in the same way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

from tests.support.scenarios import Ask, Scenario

_SIMPLER: dict[str, object] = {
    "stop_at": None,
    "host_cache": None,
    "share_prefixes": False,
    "exact_seeds": False,
    "offloaded": False,
    "sizes": (),
    "max_queue": 256,
    "window": None,
    "window_chunk": 1,
    "batch_size": 64,
    "parallel": 8,
    "block_size": 16,
}
_SIMPLER_ASK: dict[str, object] = {
    "arrives": 0,
    "after": None,
    "stream": False,
    "timeout": None,
    "leaves": None,
    "constrained": False,
    "logprobs": None,
    "fault": None,
    "fault_at": 0,
    "entropy": 0,
}


def shrink(scenario: Scenario, failure: Callable[[Scenario], str | None], *, seconds: float = 60.0) -> Scenario:
    """Return a scenario that fails as another does, and none of whose simpler forms does.

    Args:
        scenario: which fails.
        failure: says in which way a scenario fails, or None when it does not.
        seconds: how long to look for simpler ones.
    """
    wanted, until = failure(scenario), time.monotonic() + seconds
    again = True
    while again:
        again = False
        for simpler in _simpler(scenario):
            if time.monotonic() > until:
                return scenario
            if failure(simpler) == wanted:
                scenario, again = simpler, True
                break
    return scenario


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    """Yield the scenarios that are one thing simpler, the greatest changes first."""
    replace = dataclasses.replace
    count = len(scenario.asks)
    for size in sorted({count // 2, count // 4, 1} - {0, count}, reverse=True):
        for first in range(0, count, size):
            yield replace(scenario, asks=_without(scenario.asks, set(range(first, first + size))))
    for number in range(len(scenario.failures)):
        yield replace(scenario, failures=scenario.failures[:number] + scenario.failures[number + 1 :])
    if len(scenario.cells) > 1:
        yield replace(scenario, cells=scenario.cells[1:], max_tokens=None)
    for name, value in _SIMPLER.items():
        if getattr(scenario, name) != value:
            yield replace(scenario, **{name: value})
    for number, ask in enumerate(scenario.asks):
        for simpler in _simpler_asks(ask):
            yield replace(scenario, asks=(*scenario.asks[:number], simpler, *scenario.asks[number + 1 :]))


def _without(asks: tuple[Ask, ...], gone: set[int]) -> tuple[Ask, ...]:
    """Return the requests but for some; those whose prompts go on from one that is gone stand for themselves."""
    numbers = {old: new for new, old in enumerate(number for number in range(len(asks)) if number not in gone)}
    return tuple(
        dataclasses.replace(asks[old], after=None if asks[old].after is None else numbers.get(asks[old].after))  # type: ignore[arg-type]
        for old in numbers
    )


def _simpler_asks(ask: Ask) -> Iterator[Ask]:
    replace, kwargs = dataclasses.replace, ask.kwargs
    for name in kwargs:
        if name not in ("max_length", "max_new_tokens", "do_sample"):
            yield replace(ask, kwargs={key: value for key, value in kwargs.items() if key != name})
    for name, value in _SIMPLER_ASK.items():
        if getattr(ask, name) != value:
            yield replace(ask, **{name: value})
    size = len(ask.prompt)
    for less in (size // 2, size // 4, 1):
        if 0 < less < size:
            yield _shorter(ask, less)
    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
        least = 2 if name == "num_beams" else 1
        for value in (least, kwargs.get(name, 0) // 2, kwargs.get(name, 0) - 1):
            if least <= value < kwargs.get(name, 0):
                yield replace(ask, kwargs=kwargs | {name: value})


def _shorter(ask: Ask, less: int) -> Ask:
    """Return a request with a shorter prompt, and as much to generate."""
    kwargs = dict(ask.kwargs)
    if "max_length" in kwargs:
        kwargs["max_length"] -= less
    return dataclasses.replace(ask, prompt=ask.prompt[less:], kwargs=kwargs)
