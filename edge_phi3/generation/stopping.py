"""When a sequence ends: end tokens, length, stop strings, time."""

import codecs
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

    `vocabulary` has the text of each token id as it appears inside a sentence; None for an id without a token, which no
    string can reach across. Ids past its end count as None. No string is empty.
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


class StopTexts:
    """Ends a sequence in whose text, as a reader sees it, one of the given texts, none empty, has been generated.

    `vocabulary` has the bytes that each token id adds to a text, none where it is left out; `prompt_length` tokens in
    front are not looked at.
    """

    def __init__(self, texts: Sequence[str], vocabulary: Sequence[bytes], prompt_length: int) -> None:
        self._texts = tuple(texts)
        self._vocabulary = vocabulary
        self._prompt_length = prompt_length
        # With the beginning of a character that goes on in it.
        self._window = max(len(text.encode("utf-8", "replace")) for text in texts) + 3

    def matches(self, tokens: NDArray[np.int32]) -> bool:
        """Return whether the newest of the tokens, shape (length,), completes one of the texts."""
        if not (newest := self._vocabulary[tokens[-1]]):
            return False
        pieces, wanted = [newest], self._window
        for place in range(len(tokens) - 2, self._prompt_length - 1, -1):
            if wanted <= 0:
                break
            pieces.append(self._vocabulary[tokens[place]])
            wanted -= len(pieces[-1])
        data = b"".join(reversed(pieces))
        begin = 0
        while wanted <= 0 and begin < 3 and 0x80 <= data[begin] < 0xC0:
            begin += 1
        shown, _ = codecs.utf_8_decode(data[begin:], "replace", False)
        return any(text in shown for text in self._texts)


class Stopping:
    """The bounds of one request: end tokens, the largest length of a sequence, prompt included, and stop strings.

    `strings` are what ends a sequence by its text.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompt_length: int,
        vocabulary: Sequence[str | None] | None,
        clock: Callable[[], float] = time.monotonic,
        texts: StopTexts | None = None,
    ) -> None:
        self.ends = frozenset(config.eos_token_id)
        self.total_length = config.total_length(prompt_length)
        self._clock = clock
        self._deadline = None if config.max_time is None else clock() + config.max_time
        self.strings: list[StopStrings | StopTexts] = [] if texts is None else [texts]
        if config.stop_strings:
            if vocabulary is None:
                raise ValueError("Stop strings need the texts of the vocabulary's tokens.")
            self.strings.append(StopStrings(config.stop_strings, vocabulary))

    def is_completed(self, tokens: NDArray[np.int32]) -> bool:
        """Return whether the newest token of a sequence, shape (length,), completes a string that ends it."""
        return any(strings.matches(tokens) for strings in self.strings)

    def bound(self, length: int) -> FinishReason | None:
        """Return which bound, if any, ends all sequences of this length (prompt included) now."""
        if length >= self.total_length:
            return "length"
        if self._deadline is not None and self._clock() > self._deadline:
            return "time"
        return None
