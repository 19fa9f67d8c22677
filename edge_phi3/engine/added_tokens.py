"""Splits a text at its added tokens as Hugging Face's tokenizers does, which llama.cpp cannot.

llama.cpp strips white space after a special token by C's `isspace`, byte by byte, and goes by the model's name to know
after which; tokenizers strips Unicode's white space, where the added token's own flags say so. A text that is split
here, and whose parts are given to llama.cpp one by one without special tokens, is tokenised exactly as by
``tokenizer.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which ``\\s`` is in Rust's regular expressions; Python's ``str.isspace`` has four more."""


class AddedToken(msgspec.Struct, frozen=True, rename={"text": "content"}):
    """An added token: its id and text, whether it is left out of decoded text, and which white space it swallows."""

    id: int
    text: str
    special: bool
    lstrip: bool
    rstrip: bool


def added_tokens(value: str) -> list[AddedToken]:
    """Return what the GGUF key ``edge_phi3.tokenizer.added_tokens`` holds."""
    return msgspec.json.decode(value, type=list[AddedToken])


class AddedTokenSplitter:
    """Finds added tokens in a text: the leftmost first, and the longest of those that begin there."""

    def __init__(self, added: list[AddedToken]) -> None:
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
