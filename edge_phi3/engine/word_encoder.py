"""Texts to tokens word by word, remembering words.

SentencePiece's algorithm merges neighbours whose joint text is a token, so nothing merges across a place that lies
inside no token. Phi-3's vocabulary, which is LLaMA's, has two such places: before a run of spaces (a token may begin
with spaces, or be all spaces), and on both sides of a newline. A text cut there gives the tokens of its pieces, one
after another, and pieces come again: those of a prompt are soon all known, and looking them up takes a tenth of the
time of merging them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.runtime import Model

_WORD = re.compile("[ ▁]+[^ ▁\n]*|[^ ▁\n]+|\n")
"""A run of spaces with what follows; what follows a newline; a newline. llama.cpp takes ``▁`` for a space."""
_CROSSING = re.compile("[^▁]▁|.\n|\n.", re.DOTALL)

_REMEMBERED = 1 << 18
"""Characters of all words that are remembered: some 40,000 words, 10 MB."""
_LONGEST_TEXT = 1 << 14
"""Characters. Longer ones are left to llama.cpp, which lets other threads run meanwhile; looking words up does not."""


class WordEncoder:
    """Encodes texts without special tokens exactly as `Model.tokenize`, faster. From any thread.

    Args:
        model: whose vocabulary. When its tokens lie across the places named above, or it puts no space in front of a
            text, every text is left to llama.cpp.

    Attributes:
        cuts: whether texts are cut into words.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        newline = model.tokenize("\n").tolist()
        self.cuts = model.adds_space_prefix and len(newline) == 2 and not _across(model.pieces)
        self._newline: int = newline[-1]
        self._forget()

    def encode(self, text: str) -> NDArray[np.int32]:
        """Encode a text.

        Args:
            text: any text; special tokens in it are the characters they are.

        Returns:
            Token ids, int32, shape ``(tokens,)``.
        """
        if not text or not self.cuts or len(text) > _LONGEST_TEXT:
            return self._model.tokenize(text)
        # Words are only ever added to a dictionary: that of another thread may take its place, but keeps what it has.
        known = self._known
        words = _WORD.findall(" " + text)
        if new := set(words).difference(known):
            self._learn(known, new)
        return np.fromiter(itertools.chain.from_iterable(map(known.__getitem__, words)), np.int32)

    def _learn(self, known: dict[str, tuple[int, ...]], new: Iterable[str]) -> None:
        """Encode words, all in one call: with a newline, which is nothing but itself, in front of each."""
        words = list(new)
        tokens = self._model.tokenize("".join(f"\n{word}" for word in words))
        starts = np.flatnonzero(tokens == self._newline).tolist()
        listed = tokens.tolist()
        for word, start, end in zip(words, starts, [*starts[1:], len(listed)], strict=True):
            known[word] = tuple(listed[start + 1 : end])
        self._remembered += sum(map(len, words))
        if self._remembered > _REMEMBERED:
            self._forget()

    def _forget(self) -> None:
        self._known: dict[str, tuple[int, ...]] = {"\n": (self._newline,)}
        self._remembered = 0


def _across(pieces: Iterable[bytes]) -> bool:
    """Tell whether a token lies across a place where texts are cut."""
    return any(_CROSSING.search(piece.decode("utf-8", errors="replace")) for piece in pieces)
