"""Sequences held to a grammar: llama.cpp's state of the grammar, in the terms of `edge_phi3.generation`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama import GrammarError
from edge_phi3.llama.model import CANDIDATE, Grammar, Model

_NEVER_IN_UTF8: Final = (0xC0, 0xC1, *range(0xF5, 0x100))
_NOT_AFTER: Final = {
    0xE0: range(0x80, 0xA0),
    0xED: range(0xA0, 0xC0),
    0xF0: range(0x80, 0x90),
    0xF4: range(0x90, 0xC0),
}
"""Which second bytes make no UTF-8 (RFC 3629, section 4): too long a form, half of a pair, or beyond Unicode. llama.cpp
reads some of them as the characters that they would be, a quotation mark among them."""


class GrammarConstraint:
    """Holds a sequence to a grammar; a `edge_phi3.generation.constraints.TokenConstraint`.

    Beside the grammar's own rules: special tokens never come, since an answer's text leaves them out; nor do bytes that
    are no UTF-8. End tokens come exactly when the text is whole.
    """

    __slots__ = ("_byte", "_grammar", "_vocabulary")

    def __init__(self, grammar: Grammar, vocabulary: _Vocabulary, byte: int | None = None) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self._byte = byte

    def permits(self, token: int) -> bool:
        """Return whether a token may come next."""
        if token in self._vocabulary.ends:
            return self._is_whole()
        return not self._vocabulary.banned[token] and token not in self._broken() and self._lets(token)

    def mask(self, scores: NDArray[np.float32]) -> None:
        """Set the score of every token that may not come next to minus infinity.

        Args:
            scores: shape (vocabulary,); changed in place.
        """
        candidates = self._vocabulary.candidates.copy()
        self._grammar.apply(candidates)
        refused = candidates["logit"] < 0
        refused |= self._vocabulary.banned
        refused[self._broken()] = True
        refused[list(self._vocabulary.ends)] = not self._is_whole()
        scores[refused] = -np.inf

    def accept(self, token: int) -> None:
        """Go on with a token.

        Raises:
            GrammarError: it may not come next, or is an end token.
        """
        # llama.cpp would end the process.
        if token in self._vocabulary.ends or not self.permits(token):
            raise GrammarError(f"The grammar does not let token {token} come next.")
        self._grammar.accept(token)
        self._byte = self._vocabulary.byte_of.get(token)

    def clone(self) -> GrammarConstraint:
        """Return a copy that goes its own way."""
        return GrammarConstraint(self._grammar.clone(), self._vocabulary, self._byte)

    def _is_whole(self) -> bool:
        return self._lets(self._vocabulary.llama_end)

    def _lets(self, token: int) -> bool:
        candidate = np.zeros(1, CANDIDATE)
        candidate["id"] = token
        self._grammar.apply(candidate)
        return bool(candidate["logit"][0] == 0)

    def _broken(self) -> list[int]:
        """Return the byte tokens that cannot follow the last token."""
        return [] if self._byte is None else self._vocabulary.not_after.get(self._byte, [])


class _Vocabulary:
    """What all constraints of a model with the same end tokens share.

    Attributes:
        ends: the tokens that end a sequence.
        llama_end: a token that llama.cpp takes for an end.
        candidates: all tokens, of the type `CANDIDATE`.
        banned: whether a token never comes, shape (vocabulary,).
        byte_of: the byte of each byte token.
        not_after: for a byte, the tokens of bytes that cannot follow it.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, ends: Collection[int]) -> None:
        self.ends = frozenset(ends)
        self.llama_end = model.eos_token_id
        self.candidates = np.zeros(model.vocab_size, CANDIDATE)
        self.candidates["id"] = np.arange(model.vocab_size)
        self.byte_of = tokenizer.byte_of
        token_of = {byte: token for token, byte in self.byte_of.items()}
        self.not_after = {
            byte: [token_of[after] for after in wrong if after in token_of] for byte, wrong in _NOT_AFTER.items()
        }
        self.banned = np.zeros(model.vocab_size, np.bool_)
        never = tokenizer.special_ids | tokenizer.unused_ids | tokenizer.control_ids
        self.banned[list(never)] = True
        self.banned[[token_of[byte] for byte in _NEVER_IN_UTF8 if byte in token_of]] = True


def constrain(model: Model, tokenizer: Tokenizer, grammar: str, ends: Collection[int]) -> GrammarConstraint:
    """Make the constraint of a grammar, at its start.

    Args:
        model: whose vocabulary.
        tokenizer: of the same model.
        grammar: in llama.cpp's language, GBNF; its start symbol is ``root``.
        ends: the tokens that end a sequence, at least one.

    Raises:
        GrammarError: llama.cpp cannot use the grammar, or there is no end token.
    """
    inside = [token for token in ends if 0 <= token < model.vocab_size]
    if not inside:
        raise GrammarError("A grammar needs an end token (`eos_token_id`), which comes when the text is whole.")
    if model.eos_token_id < 0:
        raise GrammarError(f"{model.path.name} names no end token, which llama.cpp's grammars need.")
    return GrammarConstraint(model.grammar(grammar), _Vocabulary(model, tokenizer, inside))
