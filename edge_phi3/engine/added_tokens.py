"""Added tokens, such as ``<|user|>``, which are found in a text before anything else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which ``\\s`` is in Rust's regular expressions; Python's ``str.isspace`` has four more."""
SHIELD = "\ud800"
"""Half of a pair: JSON in UTF-8 cannot hold it."""


class AddedToken(msgspec.Struct, frozen=True, rename={"text": "content"}):
    """An added token: its id and text, whether it is left out of decoded text, and which white space it swallows.

    A `normalized` one is found in a text as the model sees it, where spaces are "▁".
    """

    id: int
    text: str
    special: bool
    lstrip: bool
    rstrip: bool
    normalized: bool = False


class AddedTokenSplitter:
    """Splits a text at its added tokens as Hugging Face's tokenizers does, which llama.cpp cannot.

    The leftmost comes first, and the longest of those that begin there. llama.cpp strips white space after a special
    token by C's `isspace`, byte by byte, and goes by the model's name to know after which; tokenizers strips Unicode's
    white space, where the added token's own flags say so. A text that is split here, and whose parts are given to
    llama.cpp one by one without special tokens, is tokenised exactly as by ``tokenizer.json``.
    """

    def __init__(self, added: Iterable[AddedToken]) -> None:
        self._by_text = {token.text: token for token in added}
        longest_first = sorted(self._by_text, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._white_space = re.compile(f"[{WHITE_SPACE}]*")

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the parts of a text in their order: ids of added tokens, and the non-empty texts between them."""
        position = 0
        while found := self._pattern.search(text, position):
            token = self._by_text[found[0]]
            before = text[position : found.start()]
            if before := before.rstrip(WHITE_SPACE) if token.lstrip else before:
                yield before
            yield token.id
            position = found.end()
            if token.rstrip and (white := self._white_space.match(text, position)):
                position = white.end()
        if position < len(text):
            yield text[position:]

    def shield(self, value: Any) -> Any:
        """Return a value of JSON in whose texts no added token is found: `SHIELD` stands after each character of one.

        `edge_phi3.engine.tokenizer.Tokenizer.encode` takes it out again. Names by which templates look values up stay.
        """
        if isinstance(value, str):
            return self._pattern.sub(lambda found: "".join(char + SHIELD for char in found[0]), value)
        if isinstance(value, Mapping):
            return {key if key.isidentifier() else self.shield(key): self.shield(each) for key, each in value.items()}
        return [self.shield(each) for each in value] if isinstance(value, list | tuple) else value


class Escaper:
    """Makes of a text's parts what pieces are found in, with "▁" for spaces, where llama.cpp's own rule is not enough.

    Before which parts a "▁" is put, `prefix` says: "prepend" before all (a normalizer's Prepend, as in Phi-3), "always"
    before those that have none, "first" before the text's first part if it has none (a pre-tokenizer's Metaspace, as in
    copies that say they are Llamas), "never". None leaves spaces as they are, in byte-level vocabularies. `normalized`
    tokens are looked for after a normalizer has done it.
    """

    def __init__(self, normalized: Iterable[AddedToken], prefix: str | None) -> None:
        self._splitter, self._prefix = AddedTokenSplitter(normalized), prefix

    def escape(self, parts: Iterable[str | int]) -> Iterator[str | int]:
        """Yield the parts of a text, as `AddedTokenSplitter` gives them, with normalized tokens found in them."""
        begun = False
        for part in parts:
            if isinstance(part, int):
                yield part
            elif self._prefix == "prepend":
                yield from self._splitter.split(prepended(part))
            else:
                for piece in self._splitter.split(part):
                    yield piece if isinstance(piece, int) else self._metaspace(piece, first=not begun)
                    begun = True
            begun = True

    def _metaspace(self, text: str, *, first: bool) -> str:
        if self._prefix is None:
            return text
        text = text.replace(" ", "▁")
        prefixed = self._prefix == "always" or (self._prefix == "first" and first)
        return f"▁{text}" if prefixed and not text.startswith("▁") else text


def prepended(text: str) -> str:
    """Return what a normalizer's Prepend and Replace make of a text."""
    return f"▁{text}".replace(" ", "▁")
