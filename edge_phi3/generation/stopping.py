"""When a sequence ends: end tokens, length, stop strings, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig

FinishReason = Literal["stop", "stop_string", "length", "time"]


class StopStrings:
    """Ends a sequence whose text has come to hold one of the given strings. Follows ``StopStringCriteria``.

    A string counts when its last character lies in the newest token, which may go on after it. The text is that of the
    tokens one by one, so a character spelt by several byte tokens never matches, as in transformers.

    Args:
        strings: non-empty strings.
        vocabulary: text of each token id as it appears inside a sentence; None for an id without a token, which no
            string can reach across. Ids past its end count as None.
    """

    def __init__(self, strings: Sequence[str], vocabulary: Sequence[str | None]) -> None:
        self._strings = tuple(strings)
        self._vocabulary = vocabulary
        self._window = max(map(len, self._strings))

    def matches(self, tokens: NDArray[np.int32]) -> bool:
        """Return whether the newest of the tokens, shape (length,), completes a stop string."""
        vocabulary = self._vocabulary
        pieces: list[str] = []
        for token in tokens[-self._window :][::-1].tolist():
            piece = vocabulary[token] if token < len(vocabulary) else None
            if piece is None:
                break
            pieces.append(piece)
        if not pieces or not pieces[0]:
            return False
        newest = len(pieces[0])
        text = "".join(reversed(pieces))
        # A match among the last (newest + len(string) - 1) characters ends in the newest token.
        return any(string in text[-(newest + len(string) - 1) :] for string in self._strings)


class Stopping:
    """The bounds of one request: end tokens, the largest length of a sequence, prompt included, and stop strings."""

    def __init__(
        self,
        config: GenerationConfig,
        prompt_length: int,
        vocabulary: Sequence[str | None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ends = frozenset(config.eos_token_id)
        self.total_length = config.total_length(prompt_length)
        self._clock = clock
        self._deadline = None if config.max_time is None else clock() + config.max_time
        self.strings: StopStrings | None = None
        if config.stop_strings:
            if vocabulary is None:
                raise ValueError("Stop strings need the texts of the vocabulary's tokens.")
            self.strings = StopStrings(config.stop_strings, vocabulary)

    def bound(self, length: int) -> FinishReason | None:
        """Return which bound, if any, ends all sequences of this length (prompt included) now."""
        if length >= self.total_length:
            return "length"
        if self._deadline is not None and self._clock() > self._deadline:
            return "time"
        return None
