"""Text to tokens and back, as the checkpoint's own ``tokenizer.json`` does it.

Decoding follows the decoders of Hugging Face ``tokenizers``, which differ from llama.cpp's in bytes that are no UTF-8:
the chain of Phi-3's tokenizer (Replace ``▁``, ByteFallback, Fuse, Strip one leading space), or ByteLevel.
"""

from __future__ import annotations

import codecs
import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3 import byte_level
from edge_phi3.engine.family import Family, family_of
from edge_phi3.llama.model import Model

_BYTE = re.compile(rb"<0x([0-9A-F]{2})>")
_UNUSED, _CONTROL, _USER_DEFINED = 1 << 1, 1 << 3, 1 << 4
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
"""Unicode's White_Space, which ``\\s`` is in Rust's regular expressions; Python's ``str.isspace`` has four more."""


class AddedToken(msgspec.Struct, frozen=True, rename={"text": "content"}):
    """An added token: its id and text, whether it is left out of decoded text, and which white space it swallows."""

    id: int
    text: str
    special: bool
    lstrip: bool
    rstrip: bool


class AddedTokenSplitter:
    """Splits a text at its added tokens as Hugging Face's tokenizers does, which llama.cpp cannot.

    The leftmost comes first, and the longest of those that begin there. llama.cpp strips white space after a special
    token by C's `isspace`, byte by byte, and goes by the model's name to know after which; tokenizers strips Unicode's
    white space, where the added token's own flags say so. A text that is split here, and whose parts are given to
    llama.cpp one by one without special tokens, is tokenised exactly as by ``tokenizer.json``.
    """

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


class Tokenizer:
    """The vocabulary of a loaded model.

    Attributes:
        byte_level: whether all tokens stand for bytes.
        byte_of: the byte of each token of SentencePiece that stands for one.
        raw_of: the bytes of each token that is no text by itself.
        family: the rules of models with such a vocabulary.
        unused_ids: ids without a token.
        control_ids: tokens that llama.cpp takes for no text.
        special_ids: tokens that an answer's text leaves out.
        plain_texts: the text of each token that is one by itself, no byte: with special tokens, and without.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self.byte_level = model.vocabulary == byte_level.MODEL
        self._texts: list[str] = []
        self.byte_of: dict[int, int] = {}
        self.raw_of: dict[int, bytes] = {}
        for token, piece in enumerate(model.pieces):
            if self.byte_level:
                raw = byte_level.bytes_of(piece.decode("utf-8", errors="replace"))
                text = raw.decode("utf-8", errors="replace")
                if text.encode() != raw:
                    self.raw_of[token] = raw
            else:
                text = piece.decode("utf-8", errors="replace").replace("▁", " ")
                if byte := _BYTE.fullmatch(piece):
                    self.byte_of[token] = int(byte[1], 16)
                    self.raw_of[token] = bytes([self.byte_of[token]])
            self._texts.append(text)
        self.unused_ids = frozenset(np.flatnonzero(model.attributes & _UNUSED).tolist())
        control = np.flatnonzero(model.attributes & _CONTROL).tolist()
        self.control_ids = frozenset(control)
        self._special_by_text = {model.pieces[token].decode("utf-8", errors="replace"): token for token in control}
        self.family = family_of(self._special_by_text)
        described = model.metadata("edge_phi3.tokenizer.added_tokens")
        if described:
            added = msgspec.json.decode(described, type=list[AddedToken])
        else:
            added = _added_tokens_of(self.family, self._special_by_text)
            others = np.flatnonzero(model.attributes & (_USER_DEFINED | _CONTROL) == _USER_DEFINED).tolist()
            added += [AddedToken(each, self._texts[each], False, False, False) for each in others]
        self.special_ids = frozenset(token.id for token in added if token.special)
        odd = self.unused_ids | self.raw_of.keys()
        plain = {token: text for token, text in enumerate(self._texts) if token not in odd}
        self.plain_texts = plain, {token: text for token, text in plain.items() if token not in self.special_ids}
        self._splitter = AddedTokenSplitter(added)

    def encode(self, text: str, *, parse_special: bool = True) -> NDArray[np.int32]:
        """Return the token ids of a text, int32, shape ``(tokens,)``.

        A beginning-of-sequence token is in front where the checkpoint's tokenizer puts one (Phi-3's does not). With
        `parse_special`, texts such as ``<|user|>`` become their special token.
        """
        parts: list[NDArray[np.int32]] = []
        if self._model.adds_bos:
            parts.append(np.array([self._model.bos_token_id], np.int32))
        parts += [
            np.array([part], np.int32) if isinstance(part, int) else self._model.tokenize(part)
            for part in (self._splitter.split(text) if parse_special else [text])
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of the tokens that the model file gives a role, by their names in chat templates."""
        given = {role: self._model.metadata(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
        ids = {"bos_token": self._model.bos_token_id, "eos_token": self._model.eos_token_id}
        ids |= {role: int(text) for role, text in given.items() if text}
        return {role: self._texts[token] for role, token in ids.items() if 0 <= token < len(self._texts)}

    def special_token(self, text: str) -> int | None:
        """Return the id of the special token with this text, or None."""
        return self._special_by_text.get(text)

    @functools.cached_property
    def token_texts(self) -> list[str | None]:
        """The text of each token by itself: ``�`` for a byte that is no character, None for an unused id."""
        texts: list[str | None] = list(self._texts)
        for token, raw in self.raw_of.items():
            texts[token] = raw.decode("utf-8", errors="replace")
        for token in self.unused_ids:
            texts[token] = None
        return texts

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text inside a sentence, in UTF-8 or a part of it."""
        raw = self.raw_of.get(token)
        return self._texts[token].encode() if raw is None else raw

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens, as ``tokenizer.decode`` does."""
        stream = StreamDecoder(self, skip_special_tokens=skip_special_tokens)
        return stream.push(list(tokens)) + stream.finish()

    def decode_prompt(self, tokens: NDArray[np.int32]) -> DecodedPrompt:
        """Return the text of a prompt, decoded once for its answers, their streams, and their tokens' offsets.

        Args:
            tokens: token ids, int32, shape ``(tokens,)``.
        """
        decoder = StreamDecoder(self)
        certain = decoder.push(tokens.tolist())
        return DecodedPrompt(certain, certain + decoder.copy().finish(), decoder)


def _added_tokens_of(family: Family, control: Mapping[str, int]) -> list[AddedToken]:
    """Return the flags that special tokens have in a family's tokenizer_config.json."""
    return [
        AddedToken(
            token,
            text,
            special=text not in family.not_special,
            lstrip=family.lstrip and text not in family.keeps_space,
            rstrip=family.rstrip and text not in family.keeps_space,
        )
        for text, token in control.items()
    ]


class StreamDecoder:
    """Decodes tokens as they come. The pieces, joined, are what `Tokenizer.decode` returns for all tokens at once.

    A run of byte tokens is one text only when it is UTF-8 as a whole, so it is held back until the run ends. In a
    byte-level vocabulary only what is no character becomes U+FFFD, and only an incomplete character is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.unused_ids | (tokenizer.special_ids if skip_special_tokens else frozenset())
        self._texts = tokenizer.plain_texts[skip_special_tokens]
        self._run = b""
        self._begun = False

    def copy(self) -> StreamDecoder:
        """Return another that has taken the same tokens."""
        return copy.copy(self)

    @property
    def held(self) -> bytes:
        """The bytes that are held back until their run ends."""
        return self._run

    def shows(self, token: int) -> bool:
        """Return whether a token is part of the text, rather than left out."""
        return token not in self._skipped

    def push(self, tokens: Sequence[int]) -> str:
        """Take tokens, and return the text that has become certain."""
        found = list(map(self._texts.get, tokens))
        pieces: list[str] = []
        begin = 0
        for odd in [index for index, text in enumerate(found) if text is None]:
            self._take(found[begin:odd], pieces)
            raw = self._tokenizer.raw_of.get(tokens[odd])
            if raw is not None and self.shows(tokens[odd]):
                self._run += raw
                if self._tokenizer.byte_level:
                    text, used = codecs.utf_8_decode(self._run, "replace", False)
                    pieces.append(text)
                    self._run = self._run[used:]
            begin = odd + 1
        self._take(found[begin:], pieces)
        return self._strip("".join(pieces))

    def _take(self, texts: list[Any], pieces: list[str]) -> None:
        if texts:
            pieces.append(self._end_run())
            pieces += texts

    def finish(self) -> str:
        """Return what was held back, when no more tokens come."""
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run, self._run = self._run, b""
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return run.decode(errors="replace") if self._tokenizer.byte_level else "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        if self._begun or not text or self._tokenizer.byte_level:
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
