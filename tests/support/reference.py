"""What a request's answer must be: each token computed for that request alone, with no cache and no engine.

The model has no weights: what a token's keys and values are, and what its logits are, are hashes. A token's content
stands for its keys and values. It depends on the token, its position, the rotary factors, and the contents of all that
it attends to, so that a wrong, stale, missing, doubled or foreign one changes all that follow. What a token attends to
enters as a sum that needs no order, in which every content counts by its position: sums of windows are differences of
prefix sums.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.sequence import GenerationRequest
from edge_phi3.generation import Decoder, GenerationResult, advance, make_decoder
from edge_phi3.generation.decoding import TokenLogprobs
from tests.support.scenarios import INFINITE, NAN, TEXTS, VOCABULARY, Attention

MASK = (1 << 64) - 1
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_TOKEN, _POSITION, _ROTARY, _COLUMN = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93
_SPREAD = 8.0
"""The distance of the lowest and the highest logit."""
_UNLIKELY = -40.0
_COLUMNS = np.arange(1, VOCABULARY + 1, dtype=np.uint64) * np.uint64(_COLUMN)
_FILLS = {NAN: math.nan, INFINITE: math.inf}
"""Tokens, which hardly ever come, whose row of logits holds nothing but one value."""


def term(content: int, position: int) -> int:
    """Return what one token adds to the sum of what is attended to, modulo 2**64 once summed."""
    return content * (2 * position + 1)


def content(token: int, position: int, attended: int, rotary: int) -> int:
    """Return the content of a token, 64 bits, given the sum of the `term`s that it attends to, and the `kind`."""
    mixed = (attended + (token + 1) * _TOKEN + (position + 1) * _POSITION + (rotary + 1) * _ROTARY) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & MASK  # splitmix64, https://prng.di.unimi.it/splitmix64.c
    mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & MASK
    return mixed ^ (mixed >> 31)


def kind(rotary: int, adapter: int) -> int:
    """Return one number for a set of rotary factors and an adapter, which both change a token's content."""
    return rotary + 2 * adapter


def logits_of(tokens: Sequence[int], contents: Sequence[int], out: NDArray[np.float32]) -> None:
    """Write the logits that follow some tokens of some contents to `out`, shape ``(tokens, VOCABULARY)``."""
    mixed = np.array(contents, np.uint64)[:, None] + _COLUMNS
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(_FIRST)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_SECOND)
    mixed >>= np.uint64(40)
    np.multiply(mixed, np.float32(_SPREAD / (1 << 24)), out=out, casting="unsafe")
    out[:, [*_FILLS]] = _UNLIKELY
    for row, token in enumerate(tokens):
        if token in _FILLS:
            out[row] = _FILLS[token]


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


@dataclass
class Answer:
    """How a request ends: with a result or an error.

    `emitted` are pairs of the returned sequence's index and its token, as they are chosen. A row may be continued by
    several (`forks`), and all be computed anew with the second set of rotary factors (`crosses`).
    """

    result: GenerationResult | None = None
    error: Exception | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    emitted: list[tuple[int, int]] = field(default_factory=list)
    forks: bool = False
    crosses: bool = False


@dataclass
class _Row:
    """Tokens of a row, the sums of all terms before each position, and the content of the last that was computed."""

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


def answer(request: GenerationRequest, attention: Attention, *, entropy: int) -> Answer:
    """Return what a request ends with, were there no limit of time."""
    with fixed_entropy(entropy):
        decoder = make_decoder(
            request.config,
            request.prompt_ids,
            vocabulary=TEXTS,
            stop_texts=request.stop_texts,
            constraint=request.constraint,
            clock=lambda: 0.0,
        )
    found = Answer()
    if request.scored_prompt is not None:
        found.prompt_logprobs = _scored(request, request.scored_prompt, attention)
    try:
        _run(decoder, request, attention, found)
        found.result = decoder.result()
    except Exception as error:  # noqa: BLE001 - whatever it is, the engine must end with the same
        found.error = error
    return found


def _scored(request: GenerationRequest, top: int, attention: Attention) -> list[TokenLogprobs]:
    """Return how likely the model holds each token of a prompt after those before it, by the definition."""
    prompt = request.prompt_ids.tolist()
    row, rotary, scored = _Row([]), kind(attention.rotary(len(prompt)), request.adapter), list[TokenLogprobs]()
    logits = np.empty((1, VOCABULARY), np.float32)
    for token, following in itertools.pairwise(prompt):
        row.tokens.append(token)
        logits_of([token], [row.compute(attention, rotary, len(prompt))], logits)
        weights = [math.exp(each) if math.isfinite(each) else math.nan for each in logits[0].tolist()]
        total = math.fsum(weights)
        logprobs = [each - math.log(total) if math.isfinite(total) else math.nan for each in logits[0].tolist()]
        best = sorted(range(len(logprobs)), key=lambda each: (-logprobs[each], each))[:top]
        likeliest = tuple((each, logprobs[each]) for each in best) if math.isfinite(total) else ()
        scored.append(TokenLogprobs(following, logprobs[following], likeliest))
    return scored


def _run(decoder: Decoder, request: GenerationRequest, attention: Attention, found: Answer) -> None:
    prompt = request.prompt_ids.tolist()
    rows, rotary = [_Row(prompt)], attention.rotary(len(prompt))
    while not decoder.finished:
        if attention.rotary(len(rows[0].tokens)) != rotary:
            rotary, found.crosses = 1, True
            rows = [_Row(row.tokens) for row in rows]
        contents = [row.compute(attention, kind(rotary, request.adapter), len(prompt)) for row in rows]
        logits = np.empty((len(rows), VOCABULARY), np.float32)
        logits_of([row.tokens[-1] for row in rows], contents, logits)
        (step,) = advance([decoder], logits)
        found.emitted += step.emitted
        found.forks |= len(set(step.parents)) < len(step.parents)
        rows = [rows[parent].fork(token) for parent, token in zip(step.parents, step.tokens, strict=True)]
