"""Text to tokens and back, as the checkpoint's own ``tokenizer.json`` does it.

Encoding is llama.cpp's; decoding follows the decoder chain of Phi-3's tokenizer (Replace ``▁``, ByteFallback, Fuse,
Strip one leading space) of Hugging Face ``tokenizers``, which differs from llama.cpp's in bytes that are no UTF-8.
"""

from __future__ import annotations

import codecs
import copy
import functools
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3.llama.model import Model

_BYTE = re.compile(rb"<0x([0-9A-F]{2})>")
_UNUSED, _CONTROL = 1 << 1, 1 << 3
_PHI3_NOT_SPECIAL = frozenset({"</s>"})
_PHI3_KEEP_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
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

        `Tokenizer.encode` takes it out again.
        """
        if isinstance(value, str):
            return self._pattern.sub(lambda found: "".join(char + SHIELD for char in found[0]), value)
        if isinstance(value, Mapping):
            return {key: self.shield(each) for key, each in value.items()}
        return [self.shield(each) for each in value] if isinstance(value, list | tuple) else value


class Escaper:
    """Makes of a text's parts what pieces are found in, with "▁" for spaces, where llama.cpp's own rule is not enough.

    Before which parts a "▁" is put, `prefix` says: "prepend" before all (a normalizer's Prepend, as in Phi-3), "always"
    before those that have none, "first" before the text's first part if it has none (a pre-tokenizer's Metaspace, as in
    copies that say they are Llamas), "never". `normalized` tokens are looked for after a normalizer has done it.
    """

    def __init__(self, normalized: Iterable[AddedToken], prefix: str) -> None:
        self._splitter, self._prefix = AddedTokenSplitter(normalized), prefix

    def escape(self, parts: Iterable[str | int]) -> Iterator[str | int]:
        """Yield the parts of a text, as `AddedTokenSplitter` gives them, with normalized tokens found in them."""
        begun = False
        for part in parts:
            if isinstance(part, int):
                yield part
            elif self._prefix == "prepend":
                yield from self._splitter.split(_prepend(part))
            else:
                for piece in self._splitter.split(part):
                    yield piece if isinstance(piece, int) else self._metaspace(piece, first=not begun)
                    begun = True
            begun = True

    def _metaspace(self, text: str, *, first: bool) -> str:
        text = text.replace(" ", "▁")
        prefixed = self._prefix == "always" or (self._prefix == "first" and first)
        return f"▁{text}" if prefixed and not text.startswith("▁") else text


def _prepend(text: str) -> str:
    return f"▁{text}".replace(" ", "▁")


class Tokenizer:
    """The vocabulary of a loaded model.

    Attributes:
        byte_of: the byte of each token that stands for one.
        unused_ids: ids without a token.
        control_ids: tokens that llama.cpp takes for no text.
        special_ids: tokens that an answer's text leaves out.
        plain_texts: the text of each token that is one by itself, no byte: with special tokens, and without.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self._texts: list[str] = []
        self.byte_of: dict[int, int] = {}
        for token, piece in enumerate(model.pieces):
            if byte := _BYTE.fullmatch(piece):
                self.byte_of[token] = int(byte[1], 16)
            self._texts.append(piece.decode("utf-8", errors="replace").replace("▁", " "))
        self.unused_ids = frozenset(np.flatnonzero(model.attributes & _UNUSED).tolist())
        control = np.flatnonzero(model.attributes & _CONTROL).tolist()
        self.control_ids = frozenset(control)
        self._special_by_text = {self._texts[token]: token for token in control}
        described = model.metadata("edge_phi3.tokenizer.added_tokens")
        if described:
            added = msgspec.json.decode(described, type=list[AddedToken])
        else:
            added = _phi3_added_tokens(self._special_by_text)
        self.special_ids = frozenset(token.id for token in added if token.special)
        prefix = model.metadata("edge_phi3.tokenizer.prefix") or "prepend"
        normalized = [token for token in added if token.normalized]
        if prefix == "prepend":
            normalized = [msgspec.structs.replace(token, text=_prepend(token.text)) for token in normalized]
        for found in normalized:
            self._texts[found.id] = found.text.replace("▁", " ")
        odd = self.unused_ids | self.byte_of.keys()
        plain = {token: text for token, text in enumerate(self._texts) if token not in odd}
        self.plain_texts = plain, {token: text for token, text in plain.items() if token not in self.special_ids}
        self.splitter = AddedTokenSplitter(token for token in added if not token.normalized)
        plain_rule = prefix == "prepend" and not normalized
        self._escaper = None if plain_rule else Escaper(normalized, prefix)
        self._tokenize = model.tokenize if plain_rule else model.tokenize_as_is()

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool = True) -> NDArray[np.int32]:
        """Return the token ids of a text, int32, shape ``(tokens,)``.

        With `add_bos` a beginning-of-sequence token is in front where the checkpoint's tokenizer puts one (Phi-3's does
        not). With `parse_special`, texts such as ``<|user|>`` become their special token.
        """
        parts: list[NDArray[np.int32]] = []
        if add_bos and self._model.adds_bos:
            parts.append(np.array([self._model.bos_token_id], np.int32))
        found = self.splitter.split(text) if parse_special else [text]
        plain = (part if isinstance(part, int) else part.replace(SHIELD, "") for part in found)
        parts += [
            np.array([part], np.int32) if isinstance(part, int) else self._tokenize(part)
            for part in (self._escaper.escape(plain) if self._escaper else plain)
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
        for token, byte in self.byte_of.items():
            texts[token] = bytes([byte]).decode("utf-8", errors="replace")
        for token in self.unused_ids:
            texts[token] = None
        return texts

    @functools.cached_property
    def shown_bytes(self) -> tuple[list[bytes], list[bytes]]:
        """What each token adds to a text, as `bytes_of` says: with special tokens, and with none for them."""
        shown = [b"" if token in self.unused_ids else self.bytes_of(token) for token in range(self.vocab_size)]
        return shown, [b"" if token in self.special_ids else data for token, data in enumerate(shown)]

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text inside a sentence, in UTF-8 or a part of it."""
        byte = self.byte_of.get(token)
        return self._texts[token].encode() if byte is None else bytes([byte])

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens, as ``tokenizer.decode`` does."""
        stream = StreamDecoder(self, skip_special_tokens=skip_special_tokens)
        return stream.push(list(tokens)) + stream.finish()

    def decode_prompt(
        self,
        tokens: NDArray[np.int32],
        *,
        skip_special_tokens: bool = True,
        whole_runs: bool = True,
        hidden: Container[int] = (),
    ) -> DecodedPrompt:
        """Return the text of a prompt, decoded once for its answers, their streams, and their tokens' offsets.

        Args:
            tokens: token ids, int32, shape ``(tokens,)``.
            skip_special_tokens: whether special tokens are left out.
            whole_runs: see `StreamDecoder`.
            hidden: tokens of the answers that are left out of their texts.
        """
        decoder = StreamDecoder(self, skip_special_tokens=skip_special_tokens, whole_runs=whole_runs)
        certain = decoder.push(tokens.tolist())
        whole = certain + decoder.copy().finish()
        decoder.hidden = hidden
        return DecodedPrompt(certain, whole, decoder)


def _phi3_added_tokens(control: Mapping[str, int]) -> list[AddedToken]:
    """Return the flags of special tokens in Phi-3's tokenizer_config.json, for GGUFs that do not carry them."""
    return [
        AddedToken(
            token, text, special=text not in _PHI3_NOT_SPECIAL, lstrip=False, rstrip=text not in _PHI3_KEEP_SPACE
        )
        for text, token in control.items()
    ]


class StreamDecoder:
    """Decodes tokens as they come. The pieces, joined, are the text of all tokens at once.

    A run of byte tokens is UTF-8. Where it is not, each byte of it becomes U+FFFD in the decoder of ``tokenizers``, and
    of `Tokenizer.decode`: a run is held back until it ends or is broken. Without `whole_runs` only what is no
    character becomes U+FFFD, and only an incomplete character is held back.

    Attributes:
        hidden: tokens that are left out of the text from now on.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, whole_runs: bool = True) -> None:
        self.hidden: Container[int] = ()
        self._tokenizer = tokenizer
        self._skipped = tokenizer.unused_ids | (tokenizer.special_ids if skip_special_tokens else frozenset())
        self._texts = tokenizer.plain_texts[skip_special_tokens]
        self._whole_runs = whole_runs
        self._run = b""
        self._broken = False
        self._begun = False

    def copy(self) -> StreamDecoder:
        """Return another that has taken the same tokens."""
        return copy.copy(self)

    @property
    def holds(self) -> bool:
        """Whether bytes are held back."""
        return bool(self._run)

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
            byte = self._tokenizer.byte_of.get(tokens[odd])
            if byte is not None and self.shows(tokens[odd]):
                run.append(byte)
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
