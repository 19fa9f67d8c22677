"""Stop texts as OpenAI means them: the answer ends before the text, and no part of it is shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopTrimmer:
    """Passes text on as far as it cannot belong to a stop text.

    Attributes:
        stopped: whether a stop text was met; nothing is passed on after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take new text, and give what is certain not to be part of a stop text."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.stopped = True
            self._held = ""
            return held[: min(places)]
        kept = max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def finish(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def trim(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return a whole text up to its first stop text, and whether there was one."""
    trimmer = StopTrimmer(stops)
    return trimmer.push(text) + trimmer.finish(), trimmer.stopped


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
