"""Tokens to text, whole and as they come.

Decoding follows the decoders of Hugging Face ``tokenizers``, which differ from llama.cpp's in bytes that are no UTF-8:
the chain of Phi-3's tokenizer (Replace ``▁``, ByteFallback, Fuse, Strip one leading space), or ByteLevel.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class TokenTexts(Protocol):
    """What `edge_phi3.engine.tokenizer.Tokenizer` knows of its tokens' texts."""

    byte_level: bool
    raw_of: dict[int, bytes]
    unused_ids: frozenset[int]
    special_ids: frozenset[int]
    plain_texts: tuple[dict[int, str], dict[int, str]]


class StreamDecoder:
    """Decodes tokens as they come. The pieces, joined, are the text of all tokens at once.

    A run of byte tokens is UTF-8. Where it is not, each byte of it becomes U+FFFD in the decoder of ``tokenizers``, and
    of `Tokenizer.decode`: a run is held back until it ends or is broken. Without `whole_runs`, and in a byte-level
    vocabulary always, only what is no character becomes U+FFFD, and only an incomplete character is held back.

    Attributes:
        hidden: tokens that are left out of the text from now on.
    """

    def __init__(self, tokenizer: TokenTexts, *, skip_special_tokens: bool = True, whole_runs: bool = True) -> None:
        self.hidden: Container[int] = ()
        self._tokenizer = tokenizer
        self._skipped = tokenizer.unused_ids | (tokenizer.special_ids if skip_special_tokens else frozenset())
        self._texts = tokenizer.plain_texts[skip_special_tokens]
        self._whole_runs = whole_runs and not tokenizer.byte_level
        self._run = b""
        self._broken = False
        self._begun = tokenizer.byte_level

    def copy(self) -> StreamDecoder:
        """Return another that has taken the same tokens."""
        return copy.copy(self)

    @property
    def held(self) -> bytes:
        """The bytes that are held back."""
        return self._run

    def shows(self, token: int) -> bool:
        """Return whether a token is part of the text, rather than left out."""
        return token not in self._skipped and token not in self.hidden

    def push(self, tokens: Sequence[int]) -> str:
        """Take tokens, and return the text that has become certain."""
        if self.hidden:
            tokens = [token for token in tokens if token not in self.hidden]
        found: list[Any] = list(map(self._texts.get, tokens))
        pieces: list[str] = []
        run = bytearray()
        begin = 0
        for odd in [index for index, text in enumerate(found) if text is None]:
            if begin < odd:
                pieces += [self._certain(run, ended=True), *found[begin:odd]]
                run.clear()
            if self.shows(tokens[odd]):
                run += self._tokenizer.raw_of.get(tokens[odd], b"")
            begin = odd + 1
        if begin < len(found):
            pieces += [self._certain(run, ended=True), *found[begin:]]
            run.clear()
        return self._strip("".join(pieces) + self._certain(run))

    def finish(self) -> str:
        """Return what was held back, when no more tokens come."""
        return self._strip(self._certain(ended=True))

    def _certain(self, more: bytes | bytearray = b"", *, ended: bool = False) -> str:
        """Take more bytes of a run, return what is certain of it, all of it where it has ended, and hold the rest."""
        run, self._run = self._run + more, b""
        if not self._whole_runs:
            text, used = codecs.utf_8_decode(run, "replace", ended)
            self._run = run[used:]
            return text
        broken = self._broken
        if not broken:
            try:
                text, _ = codecs.utf_8_decode(run, "strict", ended)
            except UnicodeDecodeError:
                broken = True
        self._broken = broken and not ended
        if broken:
            return "\ufffd" * len(run)
        if ended:
            return text
        self._run = run
        return ""

    def _strip(self, text: str) -> str:
        if self._begun or not text:
            return text
        self._begun = True
        return text.removeprefix(" ")


@dataclass(frozen=True, slots=True)
class DecodedPrompt:
    """A prompt's text.

    Attributes:
        certain: the part that no later token can change.
        whole: what its tokens are by themselves.
        decoder: has taken its tokens; a copy takes those that follow.
    """

    certain: str
    whole: str
    decoder: StreamDecoder


_ARTEFACTS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def clean_up_tokenization(text: str) -> str:
    """Remove the spaces that word-piece tokenizers leave before punctuation (``PreTrainedTokenizerBase``'s method)."""
    for artefact in _ARTEFACTS:
        text = text.replace(artefact, artefact.strip())
    return text
