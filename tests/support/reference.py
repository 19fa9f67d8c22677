"""What a request's answer must be: each token computed for that request alone, with no cache and no engine."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_phi3.engine.sequence import GenerationRequest
from edge_phi3.generation import Decoder, GenerationResult, advance, make_decoder
from tests.support.hash_model import MASK, HashModel, content, term

_randbits = secrets.randbits
_entropy = threading.local()


def _repeatable_bits(k: int) -> int:
    bits: int | None = getattr(_entropy, "bits", None)
    return _randbits(k) if bits is None else bits


@contextlib.contextmanager
def fixed_entropy(bits: int) -> Iterator[None]:
    """Let every request without a seed that this thread makes inside draw the same numbers."""
    secrets.randbits = _repeatable_bits
    _entropy.bits = bits
    try:
        yield
    finally:
        _entropy.bits = None


@dataclass(frozen=True)
class Attention:
    """What tokens attend to, and with which rotary factors.

    Attributes:
        window: how many tokens attention reaches back, the token itself included; None for all.
        window_chunk: tokens of a prompt that are fed at a time beyond the window.
        max_tokens: the longest sequence with the first set of rotary factors; None when there is one set.
    """

    window: int | None = None
    window_chunk: int = 1
    max_tokens: int | None = None

    def first_seen(self, position: int, prompt_length: int) -> int:
        if self.window is None or position < self.window:
            return 0
        if position < prompt_length:
            position = self.window + (position - self.window) // self.window_chunk * self.window_chunk
        return position - self.window + 1

    def rotary(self, length: int) -> int:
        return int(self.max_tokens is not None and length > self.max_tokens)


@dataclass
class Answer:
    """How a request ends.

    Attributes:
        result: what it generates, or None when it fails.
        error: why it fails, or None.
        emitted: pairs of the returned sequence's index and its token, in the order in which they are chosen.
        forks: whether a row is continued by several.
        crosses: whether all is computed anew with the second set of rotary factors.
    """

    result: GenerationResult | None = None
    error: Exception | None = None
    emitted: list[tuple[int, int]] = field(default_factory=list)
    forks: bool = False
    crosses: bool = False


@dataclass
class _Row:
    """Tokens of one row; the content of the last that was computed, and the sums of all terms before each position."""

    tokens: list[int]
    sums: list[int] = field(default_factory=lambda: [0])
    last: int = 0

    def fork(self, token: int) -> _Row:
        return _Row([*self.tokens, token], self.sums[:], self.last)

    def compute(self, attention: Attention, rotary: int, prompt_length: int) -> int:
        """Compute what is not computed yet, and return the last content."""
        for position in range(len(self.sums) - 1, len(self.tokens)):
            attended = (self.sums[-1] - self.sums[attention.first_seen(position, prompt_length)]) & MASK
            self.last = content(self.tokens[position], position, attended, rotary)
            self.sums.append((self.sums[-1] + term(self.last, position)) & MASK)
        return self.last


def contents_of(tokens: Sequence[int], attention: Attention, rotary: int) -> list[int]:
    """Return the contents of a sequence of which no token belongs to a prompt, or where that makes no difference."""
    row, contents = _Row([]), []
    for token in tokens:
        row.tokens.append(token)
        contents.append(row.compute(attention, rotary, 0))
    return contents


def answer(
    request: GenerationRequest, model: HashModel, attention: Attention, texts: Sequence[str | None], *, entropy: int = 0
) -> Answer:
    """Return what a request ends with, were there no limit of time.

    Args:
        request: what is asked.
        model: makes the logits.
        attention: what tokens attend to.
        texts: the text of each token, for stop strings.
        entropy: what a request without a seed is drawn with.
    """
    with fixed_entropy(entropy):
        decoder = make_decoder(
            request.config,
            request.prompt_ids,
            vocabulary=texts,
            constraint=request.constraint,
            clock=lambda: 0.0,
        )
    found = Answer()
    try:
        _run(decoder, request.prompt_ids.tolist(), model, attention, found)
        found.result = decoder.result()
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine must end with the same
        found.error = error
    return found


def _run(decoder: Decoder, prompt: list[int], model: HashModel, attention: Attention, found: Answer) -> None:
    rows, rotary = [_Row(prompt)], attention.rotary(len(prompt))
    while not decoder.finished:
        if attention.rotary(len(rows[0].tokens)) != rotary:
            rotary, found.crosses = 1, True
            rows = [_Row(row.tokens) for row in rows]
        contents = [row.compute(attention, rotary, len(prompt)) for row in rows]
        logits = np.empty((len(rows), model.vocab_size), np.float32)
        model.logits([row.tokens[-1] for row in rows], contents, logits)
        (step,) = advance([decoder], logits)
        found.emitted += step.emitted
        found.forks |= len(set(step.parents)) < len(step.parents)
        rows = [rows[parent].fork(token) for parent, token in zip(step.parents, step.tokens, strict=True)]
