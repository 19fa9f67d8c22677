"""Text to tokens and back, as the checkpoint's own ``tokenizer.json`` does it, and what is known of each token."""

from __future__ import annotations

import codecs
import copy
import functools
import itertools
import re
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3 import byte_level
from edge_phi3.engine.added_tokens import SHIELD, AddedToken, AddedTokenSplitter, escaped, prepended
from edge_phi3.engine.errors import ContextLengthError, RequestTooLargeError
from edge_phi3.engine.family import family_of
from edge_phi3.llama.model import Model

_BYTE = re.compile(rb"<0x([0-9A-F]{2})>")
_UNUSED, _CONTROL, _USER_DEFINED = 1 << 1, 1 << 3, 1 << 4
_BLOCK = 1 << 14
_PARTS = 1024
"""How many parts of a text are encoded together: a call takes longer than a short part."""
MOST_TOKENS = 1 << 17
"""Tokens of a text, beyond which it is refused: while a list of millions is made, the interpreter does nothing else."""
_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


class Tokenizer:
    """The vocabulary of a loaded model.

    Attributes:
        byte_level: whether all tokens stand for bytes.
        raw_of: the bytes of each token that is no text by itself.
        family: the rules of models with such a vocabulary.
        unused_ids: ids without a token.
        control_ids: tokens that llama.cpp takes for no text.
        special_ids: tokens that an answer's text leaves out.
        plain_texts: the text of each token that is one by itself, no byte: with special tokens, and without.
        shield: hides added tokens in a value of JSON, see `AddedTokenSplitter.shield`.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.vocab_size = model.vocab_size
        self.byte_level = model.vocabulary == byte_level.MODEL
        self._texts: list[str] = []
        self.raw_of: dict[int, bytes] = {}
        for token, piece in enumerate(model.pieces):
            text = piece.decode("utf-8", errors="replace")
            if self.byte_level:
                raw = byte_level.bytes_of(text)
                text = raw.decode("utf-8", errors="replace")
                if text.encode() != raw:
                    self.raw_of[token] = raw
            elif byte := _BYTE.fullmatch(piece):
                self.raw_of[token] = bytes([int(byte[1], 16)])
            self._texts.append(text if self.byte_level else text.replace("▁", " "))
        self.unused_ids = frozenset(np.flatnonzero(model.attributes & _UNUSED).tolist())
        control = np.flatnonzero(model.attributes & _CONTROL).tolist()
        self.control_ids = frozenset(control)
        self._special_by_text = {model.pieces[token].decode("utf-8", errors="replace"): token for token in control}
        self.family = family_of(self._special_by_text)
        added = self._added_tokens()
        self.special_ids = frozenset(token.id for token in added if token.special)
        normalized = [token for token in added if token.normalized]
        usual = "never" if model.metadata("tokenizer.ggml.add_space_prefix") == "false" else "prepend"
        prefix = None if self.byte_level else model.metadata("edge_phi3.tokenizer.prefix") or usual
        if prefix == "prepend":
            normalized = [msgspec.structs.replace(token, text=prepended(token.text)) for token in normalized]
        if prefix is not None:
            for found in (*normalized, *(token for token in added if token.single_word and not token.normalized)):
                self._texts[found.id] = found.text.replace("▁", " ")
        odd = self.unused_ids | self.raw_of.keys()
        plain = {token: text for token, text in enumerate(self._texts) if token not in odd}
        self.plain_texts = plain, {token: text for token, text in plain.items() if token not in self.special_ids}
        as_given = [token for token in added if not token.normalized]
        plain_ones = [token for token in as_given if not token.special]
        self._splitters = AddedTokenSplitter(plain_ones), AddedTokenSplitter(as_given)
        self.shield = AddedTokenSplitter(added).shield
        self._normalized, self._prefix = AddedTokenSplitter(normalized), prefix
        self._front = (model.bos_token_id,) if model.adds_bos else ()
        # No token stands for more characters than its text has, unless characters are unknown, for want of their bytes.
        known = set(map(self.bytes_of, range(self.vocab_size))) >= {bytes([byte]) for byte in range(256)}
        self._longest = max(map(len, self._texts)) if known else sys.maxsize

    def _added_tokens(self) -> list[AddedToken]:
        described, family = self._model.metadata("edge_phi3.tokenizer.added_tokens"), self.family
        if described:
            return msgspec.json.decode(described, type=list[AddedToken])
        kinds = self._model.attributes & (_USER_DEFINED | _CONTROL)
        others = np.flatnonzero(kinds == _USER_DEFINED).tolist()
        found = []
        for text, token in self._special_by_text.items():
            left, right = (swallows and text not in family.keeps_space for swallows in (family.lstrip, family.rstrip))
            found.append(AddedToken(token, text, text not in family.not_special, left, right))
        return found + [AddedToken(token, self._texts[token], False, False, False) for token in others]

    def encode(
        self, text: str, *, parse_special: bool = True, add_bos: bool = True, below: int = sys.maxsize
    ) -> NDArray[np.int32]:
        """Return the token ids of a text, int32, shape ``(tokens,)``.

        With `add_bos` a beginning-of-sequence token is in front where the checkpoint's tokenizer puts one (Phi-3's does
        not). With `parse_special`, texts such as ``<|user|>`` become their special token.

        Raises:
            ContextLengthError: there are not fewer than `below`. Where the length of a text shows that, nothing is
                computed.
            RequestTooLargeError: there are more than `MOST_TOKENS`.
        """
        parts = escaped(self._splitters[parse_special].split(text), self._normalized, self._prefix)
        front = self._front if add_bos else ()
        return np.fromiter(itertools.chain(front, self._ids(parts, len(front), below)), np.int32)

    def _ids(self, parts: Iterator[str | int], found: int, below: int) -> Iterator[int]:
        while block := list(itertools.islice(parts, _PARTS)):
            texts = [part.replace(SHIELD, "") for part in block if isinstance(part, str)]
            found += len(block) - len(texts)
            least = found + sum(-(-len(text) // self._longest) for text in texts)
            encodings = self._model.encode(texts) if least < min(below, MOST_TOKENS + 1) else []
            found += sum(map(len, encodings))
            if (count := max(found, least)) >= below:
                raise ContextLengthError(
                    f"The prompt has at least {count} tokens, but this model's maximum context length is"
                    f" {below} tokens; shorten the prompt."
                )
            if count > MOST_TOKENS:
                raise RequestTooLargeError(f"A text has at least {count} tokens; at most {MOST_TOKENS} are read.")
            each = iter(encodings)
            for part in block:
                yield from (part,) if isinstance(part, int) else next(each).ids

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

    @functools.cached_property
    def shown_bytes(self) -> tuple[list[bytes], list[bytes]]:
        """What each token adds to a text, as `bytes_of` says: with special tokens, and with none for them."""
        shown = [b"" if token in self.unused_ids else self.bytes_of(token) for token in range(self.vocab_size)]
        return shown, [b"" if token in self.special_ids else data for token, data in enumerate(shown)]

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text inside a sentence, in UTF-8 or a part of it."""
        raw = self.raw_of.get(token)
        return self._texts[token].encode() if raw is None else raw

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True, whole_runs: bool = True) -> str:
        """Return the text of tokens, as ``tokenizer.decode`` does; `whole_runs`: see `StreamDecoder`."""
        stream = StreamDecoder(self, skip_special_tokens=skip_special_tokens, whole_runs=whole_runs)
        each = iter(tokens)
        blocks = iter(lambda: list(itertools.islice(each, _BLOCK)), [])
        return "".join(map(stream.push, blocks)) + stream.finish()

    def decode_prompt(
        self,
        tokens: NDArray[np.int32],
        *,
        skip_special_tokens: bool = True,
        whole_runs: bool = True,
        hidden: Container[int] = (),
    ) -> DecodedPrompt:
        """Return the text of a prompt, decoded once for its answers, their streams, and their tokens' offsets.

        `tokens` are of shape ``(tokens,)``, `hidden` those that the texts of the answers leave out; the other options
        are those of `StreamDecoder`.
        """
        decoder = StreamDecoder(self, skip_special_tokens=skip_special_tokens, whole_runs=whole_runs)
        certain = decoder.push(tokens.tolist())
        whole = certain + decoder.copy().finish()
        decoder.hidden = hidden
        return DecodedPrompt(certain, whole, decoder)


class StreamDecoder:
    """Decodes tokens as they come. The pieces, joined, are the text of all tokens at once.

    It follows the decoders of ``tokenizers``, which differ from llama.cpp's in bytes that are no UTF-8: the chain of
    Phi-3's (Replace ``▁``, ByteFallback, Fuse, Strip one leading space), or ByteLevel.

    A run of byte tokens is UTF-8. Where it is not, each byte of it becomes U+FFFD in the decoder of ``tokenizers``, and
    of `Tokenizer.decode`: a run is held back until it ends or is broken. Without `whole_runs`, and in a byte-level
    vocabulary always, only what is no character becomes U+FFFD, and only an incomplete character is held back.

    Attributes:
        hidden: tokens that are left out of the text from now on.
        held: the bytes that are held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, whole_runs: bool = True) -> None:
        self.hidden: Container[int] = ()
        self._tokenizer = tokenizer
        self._skipped = tokenizer.unused_ids | (tokenizer.special_ids if skip_special_tokens else frozenset())
        self._texts = tokenizer.plain_texts[skip_special_tokens]
        self._whole_runs = whole_runs and not tokenizer.byte_level
        self.held = b""
        self._broken = False
        self._begun = tokenizer.byte_level

    def copy(self) -> StreamDecoder:
        """Return another that has taken the same tokens."""
        return copy.copy(self)

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
        run, self.held = self.held + more, b""
        if not self._whole_runs:
            text, used = codecs.utf_8_decode(run, "replace", ended)
            self.held = run[used:]
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
        self.held = run
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
