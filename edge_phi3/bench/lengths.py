"""Distributions of lengths, written as a user writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_phi3.bench.errors import BenchError

FORMS = "64, 16-128 (uniform), normal:MEAN,SD, lognormal:MEDIAN,SIGMA or exponential:MEAN"
"""The forms that `Lengths.parse` reads, for help texts and messages."""

_Draw = Callable[[np.random.Generator], float]
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens.

    Attributes:
        text: how it was written.
        draw_real: draws one value, before it is rounded and kept at 1 or above.
    """

    text: str
    draw_real: _Draw

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read one of the `FORMS`.

        Raises:
            BenchError: it is none of them.
        """
        kind, _, rest = text.strip().partition(":")
        if not rest:
            low, separator, high = kind.partition("-")
            if low.isdecimal() and int(low) > 0 and not separator:
                return cls(text, lambda _: int(low))
            if low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high):
                return cls(text, lambda random: int(random.integers(int(low), int(high) + 1)))
        else:
            numbers = [float(part) for part in rest.split(",") if _NUMBER.fullmatch(part.strip())]
            draw = _named(kind, numbers) if len(numbers) == len(rest.split(",")) else None
            if draw is not None:
                return cls(text, draw)
        raise BenchError(f"{text!r} is not a distribution of lengths; give {FORMS}.")

    def draw(self, random: np.random.Generator) -> int:
        """Draw one length, at least 1."""
        return max(1, round(self.draw_real(random)))


def _named(kind: str, numbers: Sequence[float]) -> _Draw | None:
    match kind, numbers:
        case "normal", [mean, deviation] if mean > 0:
            return lambda random: random.normal(mean, deviation)
        case "lognormal", [median, sigma] if median > 0:
            return lambda random: random.lognormal(np.log(median), sigma)
        case "exponential", [mean] if mean > 0:
            return lambda random: random.exponential(mean)
    return None
