"""Texts to tokens word by word, remembering words.

SentencePiece's algorithm merges neighbours whose joint text is a token, so nothing merges across a place that lies
inside no token. Phi-3's vocabulary, which is LLaMA's, has two such places: before a run of spaces (a token may begin
with spaces, or be all spaces), and on both sides of a newline. A text cut there gives the tokens of its pieces, one
after another, and pieces come again: those of a prompt are soon all known, and looking them up takes a tenth of the
time of merging them.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.runtime import Model

_WORD = re.compile("[ ▁]+[^ ▁\n]*|\n+[^ ▁\n]*")
"""A run of spaces, or of newlines, with what follows. llama.cpp takes ``▁`` for a space."""
_CROSSING = re.compile("[^▁]▁|.\n|\n.", re.DOTALL)

_REMEMBERED_WORDS = 1 << 15
"""They take about 10 MB. The 32,768 most common words of a language are nearly all that are used."""
_LONGEST_WORD = 64
"""Characters. Longer ones hardly come again: data in base64, writing without spaces."""
_LONGEST_TEXT = 1 << 14
"""Characters. Longer ones are left to llama.cpp, which lets other threads run meanwhile; looking words up does not."""


class WordEncoder:
    """Encodes texts without special tokens exactly as `Model.tokenize`, faster. From any thread.

    Args:
        model: whose vocabulary. When its tokens lie across the places named above, or it puts no space in front of a
            text, every text is left to llama.cpp.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known = functools.lru_cache(_REMEMBERED_WORDS)(self._encode)
        self._newline = len(model.tokenize("\n"))
        self.cuts = model.adds_space_prefix and not _across(model.pieces)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Encode a text.

        Args:
            text: any text; special tokens in it are the characters they are.

        Returns:
            Token ids, int32, shape ``(tokens,)``.
        """
        if not text or not self.cuts or len(text) > _LONGEST_TEXT:
            return self._model.tokenize(text)
        words = _WORD.findall(" " + text)
        return np.fromiter(itertools.chain.from_iterable(map(self._look_up, words)), np.int32)

    def _look_up(self, word: str) -> tuple[int, ...]:
        return self._known(word) if len(word) <= _LONGEST_WORD else self._encode(word)

    def _encode(self, word: str) -> tuple[int, ...]:
        # Behind a newline, since llama.cpp puts a space in front of what it is given.
        return tuple(self._model.tokenize("\n" + word)[self._newline :].tolist())


def _across(pieces: Iterable[bytes]) -> bool:
    """Tell whether a token lies across a place where texts are cut."""
    return any(_CROSSING.search(piece.decode("utf-8", errors="replace")) for piece in pieces)
