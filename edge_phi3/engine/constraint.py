"""Sequences held to a grammar, such as that of a JSON schema: llguidance, in the terms of `edge_phi3.generation`.

llguidance tells which tokens may come next. So that answers end, space is scarce in JSON, and the digits of a number
are few.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from edge_phi3.engine.errors import SchemaError
from edge_phi3.engine.grammars import Grammar
from edge_phi3.engine.json_schema import DEFAULT_LIMITS, SchemaLimits, adapted
from edge_phi3.engine.tokenizer import Tokenizer

_CHARACTERS_OF_RULES: Final = 64
"""Of `SchemaLimits.size` for each rule that may come next, all of which take time that grows with their square."""
_MOST_SECONDS: Final = 1.0
"""Of processor time, for all that llguidance is asked for a request, beyond `_SECONDS_OF_MASK` each time."""
_SECONDS_OF_MASK: Final = 0.001
_SPECIAL: Final = b"\xff"
"""What llguidance takes for the beginning of a token that is no text."""

_MOST_DIGITS: Final = 16
_MOST_DIGITS_OF_EXPONENT: Final = 2
_ANY_NUMBER: Final = 1 << 30
_LONGEST_BEGINNING: Final = 32
"""Bytes of what JSON begins behind, at least."""
_FEW: Final = 64
"""Tokens that a text which is forced may begin with, at most."""
_QUOTE, _BACKSLASH = b'"\\'
_STACK: Final = 8 << 10
"""Bytes of stack for each character of a grammar; twice of what is needed at most."""
_STARTING: Final = threading.Lock()


@dataclass(slots=True, eq=False)
class GrammarConstraint:
    """Holds a sequence to a grammar; a `edge_phi3.generation.constrained.TokenConstraint`.

    Special tokens come only where a grammar names them. End tokens come exactly when the text is whole. Where
    llguidance fails, for example at its limits, no token may come, nor where the allowance is used up, for which other
    requests would have to wait. Where a number of JSON, which begins behind what `_json_from` finds, has `_MOST_DIGITS`
    digits in a row, no more come, if anything else may.
    """

    _matcher: LLMatcher
    _vocabulary: ConstraintVocabulary
    _ends: list[int]
    _json_from: re.Pattern[bytes] | None
    _left: list[float] = field(default_factory=lambda: [_MOST_SECONDS] * 2)
    """Seconds of processor time that all copies may still take: to go on, and to look ahead."""
    _before: bytes = b""
    _prepared: NDArray[np.bool_] | None = None
    _quoted: bool = False
    _escaped: bool = False
    _room: int = _ANY_NUMBER

    def prepare(self) -> None:
        """Find out now which tokens may come next."""
        self._prepared = self.allowed()

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next, shape (vocabulary,)."""
        if self._prepared is not None:
            return self._prepared
        if self._left[0] < 0:
            return np.zeros(len(self._vocabulary.texts), np.bool_)
        return self._found_out(0)

    def _found_out(self, purpose: int) -> NDArray[np.bool_]:
        vocabulary = self._vocabulary
        bits = np.frombuffer(self._timed(purpose, self._matcher.compute_bitmask), np.uint8)
        allowed = np.unpackbits(bits, count=len(vocabulary.texts), bitorder="little").view(np.bool_)
        allowed[self._ends] = self._matcher.is_accepting()
        if self._room < vocabulary.most_digits:
            fitting = allowed & (vocabulary.digits <= self._room)
            if fitting.any():
                return fitting
        return allowed

    def _timed(self, purpose: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return what llguidance says, and take its processor time off the allowance."""
        began = time.thread_time()
        result = work(*arguments)
        self._left[purpose] -= max(time.thread_time() - began - _SECONDS_OF_MASK, 0)
        return result

    def permits(self, token: int) -> bool:
        """Return whether a token may come next."""
        if token in self._ends:
            return self._matcher.is_accepting()
        if self._left[0] < 0 or not self._timed(0, self._matcher.validate_tokens, [token]):
            return False
        return bool(self._vocabulary.digits[token] <= self._room) or bool(self.allowed()[token])

    def mask(self, scores: NDArray[np.float32]) -> None:
        """Set the scores, shape (vocabulary,), of all tokens that may not come next to minus infinity, in place."""
        np.copyto(scores, -np.inf, where=~self.allowed())

    def forced(self, most: int) -> list[int]:
        """Return up to so many tokens of the text that comes next whatever is chosen, each as long as it may be."""
        found: list[int] = []  # llguidance would tell the text as a whole, however long it is
        ahead, texts = self, self._vocabulary.texts
        while len(found) < most and self._left[1] >= 0:
            allowed = np.flatnonzero(ahead._found_out(1) if ahead._prepared is None else ahead._prepared)
            tokens = {texts[token]: token for token in allowed[: _FEW + 1].tolist()}
            longest = max(tokens, key=len, default=b"")
            if not 0 < len(tokens) <= _FEW or tokens[longest] in self._ends or not all(map(longest.startswith, tokens)):
                break
            found.append(tokens[longest])
            ahead = self.clone() if ahead is self else ahead
            ahead.accept(tokens[longest], 1)
        return found

    def accept(self, token: int, purpose: int = 0) -> None:
        """Go on with a token that may come next and is no end token; after any other none may come."""
        self._timed(purpose, self._matcher.consume_token, token)
        self._prepared = None
        text = self._vocabulary.texts[token]
        if self._json_from is not None:
            self._before = self._before[-_LONGEST_BEGINNING:] + text
            if not (found := self._json_from.search(self._before)):
                return
            text, self._json_from, self._room = self._before[found.end() :], None, _MOST_DIGITS
        for byte in text:
            if self._quoted:
                if self._escaped or byte == _BACKSLASH:
                    self._escaped = not self._escaped
                elif byte == _QUOTE:
                    self._quoted, self._room = False, _MOST_DIGITS
            elif byte == _QUOTE:
                self._quoted, self._room = True, _ANY_NUMBER
            elif byte in b"0123456789":
                self._room = max(self._room - 1, 0)
            elif byte in b"eE":
                self._room = _MOST_DIGITS_OF_EXPONENT
            elif byte not in b"+-":
                self._room = _MOST_DIGITS

    def clone(self) -> GrammarConstraint:
        """Return a copy that goes its own way."""
        return replace(self, _matcher=self._matcher.deep_copy())


class _Tokens:
    """A vocabulary as llguidance reads it. Its end token is one that no answer has: requests have their own."""

    bos_token_id = eos_token_id = None

    def __init__(self, tokens: list[bytes], tokenizer: Tokenizer) -> None:
        self.tokens = tokens
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, parse_special=False).tolist()
        return tokens


class ConstraintVocabulary:
    """Makes the constraints of a model. From any thread.

    Attributes:
        texts: the bytes of each token; those of special tokens begin with `_SPECIAL`.
        digits: how many digits each begins with, shape (vocabulary,).
        most_digits: the most that any token begins with.
    """

    def __init__(self, tokenizer: Tokenizer, limits: SchemaLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        never = tokenizer.special_ids | tokenizer.unused_ids | tokenizer.control_ids
        self.texts = [
            (_SPECIAL if token in never else b"") + tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)
        ]
        self.digits = np.array([len(text) - len(text.lstrip(b"0123456789")) for text in self.texts], np.int32)
        self.most_digits = int(self.digits.max())
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(self.texts, tokenizer)))

    def _compiled(self, grammar: str, limits: LLParserLimits) -> LLMatcher:
        """Return a grammar's matcher, made in a thread with a deep stack: llguidance recurses along its references."""
        made: list[LLMatcher] = []
        make = partial(LLMatcher, self._tokenizer, grammar, log_level=0, limits=limits)
        thread = threading.Thread(target=lambda: made.append(make()), daemon=True)
        with _STARTING:
            usual = threading.stack_size(max(self._limits.size, 1 << 10) * _STACK)
            try:
                thread.start()
            finally:
                threading.stack_size(usual)
        thread.join()
        return made[0]

    def constrain(self, grammar: Grammar, ends: Collection[int]) -> GrammarConstraint:
        """Return the constraint of a grammar at the start of an answer, which the tokens `ends` end.

        Raises:
            SchemaError: the grammar cannot be followed, or none of them is in the vocabulary.
        """
        inside = [token for token in ends if 0 <= token < len(self.texts)]
        if not inside:
            raise SchemaError("it needs an end token (`eos_token_id`), which comes when the text is whole")
        self._limits.check(grammar.lark, *grammar.named.values())
        rules: list[dict[str, Any]] = [{"lark_grammar": grammar.lark}]
        for name, rule in grammar.named.items():
            try:
                kind, value = ("lark_grammar", rule) if name == "answer" else ("json_schema", adapted(rule))
            except RecursionError:
                raise SchemaError("its schemas lead to each other too deeply") from None
            rules.append({"name": name, kind: value})
        limits = LLParserLimits(
            max_grammar_size=1 << 18,  # more than any has: to refuse one for a few too many would take minutes
            max_items_in_row=self._limits.size // _CHARACTERS_OF_RULES,
            initial_lexer_fuel=200_000,
            step_lexer_fuel=50_000,
            step_max_items=4_000,
            precompute_large_lexemes=False,
            verbose_errors=False,
        )
        made = json.dumps({"grammars": rules})
        matcher = self._compiled(made, limits)
        constraint = GrammarConstraint(matcher, self, inside, grammar.json_from)
        space = b" " if grammar.named else None
        if all(self.texts[token] == space for token in np.flatnonzero(constraint.allowed())):
            reason = matcher.get_error()
            del matcher, constraint  # which the error would hold, and what llguidance has made of a bomb is large
            raise SchemaError(_sentence(reason))
        return constraint


def _sentence(reason: str) -> str:
    """Return llguidance's reason in one line, and without advice on options that a request does not have."""
    if reason.startswith("oneOf"):
        return (
            "`oneOf` is supported where types, texts, or a required property with a `const`, tell its schemas apart;"
            " use `anyOf`"
        )
    if "Too many items" in reason:
        return "too many of its rules may come next (--max-schema-size)"
    if not reason or reason.startswith("NoExtensionBias"):
        return "no text follows it"
    if reason.startswith("panic"):
        return "a keyword's value is none that it may have"
    return " ".join(reason.split())[:300]
