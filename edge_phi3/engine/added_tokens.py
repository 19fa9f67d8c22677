"""Added tokens, such as ``<|user|>``, which are found in a text before anything else."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which ``\\s`` is in Rust's regular expressions; Python's ``str.isspace`` has four more."""
_WINDOW = 1 << 14
SHIELD = "\ud800"
"""Half of a pair: JSON in UTF-8 cannot hold it."""


class AddedToken(msgspec.Struct, frozen=True, rename={"text": "content"}):
    """An added token: its id and text, whether it is left out of decoded text, and which white space it swallows.

    A `normalized` one is found in a text as the model sees it, where spaces are "▁", a `single_word` one not beside
    letters, digits and what else belongs to a word.
    """

    id: int
    text: str
    special: bool
    lstrip: bool
    rstrip: bool
    normalized: bool = False
    single_word: bool = False


class AddedTokenSplitter:
    """Splits a text at its added tokens as Hugging Face's tokenizers does, which llama.cpp cannot.

    The leftmost comes first, and the longest of those that begin there. llama.cpp strips white space after a special
    token by C's `isspace`, byte by byte, and goes by the model's name to know after which; tokenizers strips Unicode's
    white space, where the added token's own flags say so. A text that is split here, and whose parts are encoded one by
    one without added tokens, is tokenised exactly as by ``tokenizer.json``.
    """

    def __init__(self, added: Iterable[AddedToken]) -> None:
        self._by_text = {token.text: token for token in added}
        longest_first = sorted(self._by_text, key=len, reverse=True)
        self._longest = max(map(len, self._by_text), default=0)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._white_space = re.compile(f"[{WHITE_SPACE}]*")

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the parts of a text in their order: ids of added tokens, and the non-empty texts between them."""
        position = begin = 0
        while (found := self._find(text, begin)) is not None:
            token, (start, begin) = self._by_text[found[0]], found.span()
            if token.single_word and any(map(_is_word, text[max(0, start - 1) : start] + text[begin : begin + 1])):
                continue
            before = text[position:start]
            if before := before.rstrip(WHITE_SPACE) if token.lstrip else before:
                yield before
            yield token.id
            if token.rstrip and (white := self._white_space.match(text, begin)):
                begin = white.end()
            position = begin
        if position < len(text):
            yield text[position:]

    def _find(self, text: str, position: int) -> re.Match[str] | None:
        """Return the next added token, searched for piece by piece: a long search keeps the interpreter from others."""
        for begin in range(position, len(text), _WINDOW) if self._by_text else ():
            found = self._pattern.search(text, begin, begin + _WINDOW + self._longest)
            if found is not None and found.start() < begin + _WINDOW:
                return found
        return None

    def shield(self, value: Any) -> Any:
        """Return a value of JSON in whose texts no added token is found: `SHIELD` stands after each character of one.

        `edge_phi3.engine.tokenizer.Tokenizer.encode` takes it out again. Names by which templates look values up stay.
        """
        if isinstance(value, str):
            return self._pattern.sub(lambda found: "".join(char + SHIELD for char in found[0]), value)
        if isinstance(value, Mapping):
            return {key if key.isidentifier() else self.shield(key): self.shield(each) for key, each in value.items()}
        return [self.shield(each) for each in value] if isinstance(value, list | tuple) else value


def escaped(parts: Iterable[str | int], normalized: AddedTokenSplitter, prefix: str | None) -> Iterator[str | int]:
    """Yield the parts of a text with "▁" for spaces, as pieces are found in them, and with normalized tokens found.

    Before which parts a "▁" is put, `prefix` says: "prepend" before all (a normalizer's Prepend, as in Phi-3, after
    which the tokens are looked for), "always" before those that have none, "first" before the text's first part if it
    has none (a pre-tokenizer's Metaspace, as in copies that say they are Llamas), "never". None leaves spaces as they
    are, in byte-level vocabularies.
    """
    begun = False
    for part in parts:
        if isinstance(part, int):
            yield part
        elif prefix == "prepend":
            yield from normalized.split(prepended(part))
        else:
            for piece in normalized.split(part):
                if isinstance(piece, int) or prefix is None:
                    yield piece
                else:
                    text = _marked(piece)
                    wanted = prefix == "always" or (prefix == "first" and not begun)
                    yield f"▁{text}" if wanted and not text.startswith("▁") else text
                begun = True
        begun = True


def _is_word(character: str) -> bool:
    """Return whether a character belongs to a word, as Rust's regular expressions have it."""
    category = unicodedata.category(character)
    if category[0] in "LM" or category in {"Nd", "Nl", "Pc"}:
        return True
    return character.isupper() or character.islower() or character in "\u200c\u200d"


def prepended(text: str) -> str:
    """Return what a normalizer's Prepend and Replace make of a text."""
    return _marked(f"▁{text}")


def _marked(text: str) -> str:
    """Return a text with "▁" for spaces, made piece by piece, as it is searched."""
    return "".join(text[begin : begin + _WINDOW].replace(" ", "▁") for begin in range(0, len(text), _WINDOW))
