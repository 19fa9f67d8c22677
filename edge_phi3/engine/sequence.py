"""One request inside the engine: what it asked for, what it is told, and the sequences that it runs.

A request owns one sequence while its prompt is prefilled and as many as its decoder has rows afterwards: one per
returned sequence, or one per beam. A sequence is a llama.cpp sequence id with the tokens that belong in its KV cache.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.constraints import TokenConstraint
from edge_phi3.generation.decoding import Decoder, GenerationResult, TokenLogprobs


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is asked of the engine.

    Attributes:
        prompt_ids: token ids of the prompt, int32, shape ``(prompt_tokens,)``, at least one.
        config: the resolved generation parameters.
        stream: whether `TokensEvent`s are wanted; without them only the `FinishedEvent` is sent.
        timeout: seconds from submission after which the request fails with `DeadlineExceededError`, or None.
        request_id: what logs call this request.
        constraint: what its sequences are held to, or None.
    """

    prompt_ids: NDArray[np.int32]
    config: GenerationConfig
    stream: bool = False
    timeout: float | None = None
    request_id: str = ""
    constraint: TokenConstraint | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened to a request, in seconds.

    Attributes:
        queue: from submission to the first step that held a token of its prompt.
        first_token: from submission to the first generated token.
        total: from submission to the end.
    """

    queue: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """Tokens chosen in one step.

    Attributes:
        tokens: pairs of the returned sequence's index and the token id, in order. Empty in beam modes.
        logprobs: one for each of them, when the request asked for them, else empty.
    """

    tokens: list[tuple[int, int]]
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end of a request, and everything it produced.

    Attributes:
        result: sequences (prompt included), scores, finish reasons.
        timing: when things happened.
        cached_tokens: how many tokens of the prompt came from the prefix cache.
        generated_tokens: tokens generated, over all returned sequences.
    """

    result: GenerationResult
    timing: Timing
    cached_tokens: int
    generated_tokens: int


Event = TokensEvent | FinishedEvent | BaseException
"""What the engine sends to a request's owner: an exception or a `FinishedEvent` is the last one."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One llama.cpp sequence of a running request.

    Attributes:
        tokens: token ids that belong to the sequence, int32; the first `length` are set.
        length: how many tokens there are; those from `computed` on are still to be decoded.
        last: the last of them.
        seq_id: the llama.cpp sequence id, or -1 while the request waits.
        computed: how many tokens the KV cache holds (positions dropped by the sliding window included).
        scattered: how many of them were decoded beside other sequences, so that their cells lie apart.
    """

    tokens: NDArray[np.int32]
    length: int
    last: int
    seq_id: int = -1
    computed: int = 0
    scattered: int = 0

    @property
    def pending(self) -> int:
        """How many tokens are still to be decoded."""
        return self.length - self.computed

    def append(self, token: int) -> None:
        """Add a chosen token, to be decoded next."""
        self.extend((token,))

    def extend(self, tokens: abc.Sequence[int]) -> None:
        """Add chosen tokens, of which the last is to be decoded next."""
        if not tokens:
            return
        end = self.length + len(tokens)
        if end > len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty(end + 64, np.int32)])
        self.tokens[self.length : end] = tokens
        self.last = tokens[-1]
        self.length = end

    def fork(self, seq_id: int) -> Sequence:
        """Give a copy that goes its own way under another llama.cpp sequence id."""
        return Sequence(self.tokens.copy(), self.length, self.last, seq_id, self.computed, self.scattered)


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request that the engine has accepted.

    Attributes:
        request: what was asked.
        decoder: chooses its tokens.
        send: hands one event to the owner; called from the engine's thread, and must not block.
        arrival: order of arrival, which decides who is admitted first and who is preempted last.
        alone: whether it runs in a context of its own, as one with a seed does.
        sequences: one sequence with the prompt at first, later one for each row of the decoder.
        submitted: when it was submitted, as all times here in seconds of `time.monotonic`.
        started: when it was first admitted, or None.
        first_token: when its first token was chosen, or None.
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        generated: tokens generated so far, over all sequences.
        cancelled: whether the owner has left.
    """

    request: GenerationRequest
    decoder: Decoder
    send: Callable[[Event], None]
    arrival: int
    alone: bool = False
    sequences: list[Sequence] = field(init=False)
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    cached_tokens: int = 0
    generated: int = 0
    cancelled: bool = False

    def __post_init__(self) -> None:
        prompt = self.request.prompt_ids
        self.sequences = [Sequence(prompt.astype(np.int32), len(prompt), int(prompt[-1]))]

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def rows(self) -> int:
        """How many sequences the request decodes together: its beams, or its returned sequences."""
        config = self.request.config
        return max(config.num_beams, config.num_return_sequences)

    @property
    def max_length(self) -> int:
        """The longest that one of its sequences can become, the prompt included."""
        return self.request.config.total_length(self.prompt_length)

    @property
    def decoding(self) -> bool:
        """Whether every sequence has been computed but for the token that was chosen last."""
        return all(sequence.seq_id >= 0 and sequence.pending == 1 for sequence in self.sequences)

    @property
    def deadline(self) -> float | None:
        """The monotonic time at which the request fails, or None."""
        timeout = self.request.timeout
        return None if timeout is None else self.submitted + timeout
