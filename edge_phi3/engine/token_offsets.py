"""Where in an answer's text each of its tokens begins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edge_phi3.engine.tokenizer import DecodedPrompt, Tokenizer
from edge_phi3.generation.decoding import TokenLogprobs

_CONTINUATION = range(0x80, 0xC0)


class PlacedLogprobs(NamedTuple):
    """How likely a token of an answer was, and where it begins.

    Attributes:
        start: characters of the answer before the token's own first one. Bytes of one character begin where it does.
        logprobs: of the token.
    """

    start: int
    logprobs: TokenLogprobs


class TokenOffsets:
    """Finds the offsets of an answer's tokens as they come.

    Tokens that stand for bytes become text only when their run ends, and get their offsets then. Tokens that are left
    out of the text, such as those that end it, have none. The answer's text begins where the prompt's ends.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: DecodedPrompt) -> None:
        self._tokenizer = tokenizer
        self._decoder = prompt.decoder.copy()
        # Below 0 while a run that the prompt ends with is open.
        self._position = len(prompt.certain) - len(prompt.whole)
        self._run = self._decoder.held
        self._held: list[TokenLogprobs] = []

    def push(self, token: TokenLogprobs) -> list[PlacedLogprobs]:
        """Take the next token, and return those whose offsets have become certain."""
        token_id = token.token_id
        if self._tokenizer.byte_level:
            return self._push_bytes(token)
        text = self._decoder.push([token_id])
        if not self._decoder.shows(token_id):
            return []
        if token_id in self._tokenizer.byte_of:
            self._run += self._tokenizer.bytes_of(token_id)
            self._held.append(token)
            return []
        placed = self.finish()
        self._position += len(text)
        own = len(self._tokenizer.bytes_of(token_id).decode())
        return [*placed, PlacedLogprobs(max(0, self._position - own), token)]

    def _push_bytes(self, token: TokenLogprobs) -> list[PlacedLogprobs]:
        """Take the next token of a byte-level vocabulary: its first byte goes on with a character, or begins one."""
        first = self._decoder.held + self._tokenizer.bytes_of(token.token_id)[:1]
        start = self._position + len(first.decode(errors="replace")) - 1
        self._position += len(self._decoder.push([token.token_id]))
        return [PlacedLogprobs(max(0, start), token)] if self._decoder.shows(token.token_id) else []

    def finish(self) -> list[PlacedLogprobs]:
        """Return the tokens that were held back, when their run has ended."""
        run, held = self._run, self._held
        self._run, self._held = b"", []
        try:
            run.decode()
        except UnicodeDecodeError:
            starts = list(range(len(run)))  # each byte is a character that stands for none
        else:
            starts = np.cumsum([byte not in _CONTINUATION for byte in run]).tolist()
            starts = [start - 1 for start in starts]
        own = starts[len(run) - len(held) :]
        return [PlacedLogprobs(max(0, self._position + start), token) for start, token in zip(own, held, strict=True)]
