"""Where in an answer's text each of its tokens begins."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.tokenizer import DecodedPrompt, Tokenizer
from edge_phi3.generation.decoding import TokenLogprobs


class PlacedLogprobs(NamedTuple):
    """How likely a token of an answer was, and how many characters of it stand before the token's own first one.

    Bytes of one character begin where it does.
    """

    start: int
    logprobs: TokenLogprobs


class TokenOffsets:
    """Finds the offsets of an answer's tokens as they come.

    Tokens that are left out of the text, such as those that end it, have none, unless `every` token is to have one. The
    answer's text begins where the prompt's ends, and is decoded character by character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: DecodedPrompt, *, every: bool = False) -> None:
        self._tokenizer = tokenizer
        self._every = every
        self._decoder = prompt.decoder.copy()
        # Below 0 while a character that the prompt ends with is incomplete.
        self._position = len(prompt.certain) - len(prompt.whole)

    def push(self, token: TokenLogprobs) -> PlacedLogprobs | None:
        """Take the next token, and return it with its offset, or None where the text leaves it out."""
        token_id = token.token_id
        # Its first byte goes on with a character, or begins one.
        first = self._decoder.held + self._tokenizer.bytes_of(token_id)[:1]
        start = self._position + max(0, len(first.decode(errors="replace")) - 1)
        self._position += len(self._decoder.push([token_id]))
        if self._decoder.shows(token_id):
            return PlacedLogprobs(max(0, start), token)
        return PlacedLogprobs(max(0, self._position), token) if self._every else None


def placed(
    tokenizer: Tokenizer, prompt: DecodedPrompt, tokens: Iterable[TokenLogprobs], *, every: bool = False
) -> list[PlacedLogprobs]:
    """Return where in an answer each of its tokens begins."""
    offsets = TokenOffsets(tokenizer, prompt, every=every)
    return [found for token in tokens if (found := offsets.push(token))]


def placed_prompt(
    tokenizer: Tokenizer, prompt_ids: NDArray[np.int32], tokens: Iterable[TokenLogprobs]
) -> list[PlacedLogprobs]:
    """Return where in a prompt each of its tokens begins, given all but the first."""
    nothing = tokenizer.decode_prompt(prompt_ids[:0], skip_special_tokens=False, whole_runs=False)
    first = TokenLogprobs(int(prompt_ids[0]), math.nan, ())
    return placed(tokenizer, nothing, [first, *tokens], every=True)
