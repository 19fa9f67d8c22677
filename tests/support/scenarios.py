"""What an engine lives through: its contexts, what is asked of it, and what happens meanwhile."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3.generation import GenerationConfig, ModelDefaults

VOCABULARY = 72
UNUSED, BROKEN = range(64, 67), range(60, 64)
"""Tokens without a text, and tokens of a byte-level vocabulary whose bytes are no text by themselves."""
TEXTS = tuple(
    None if i in UNUSED else "\ufffd" if i in BROKEN else "abcdefghijklmnopqr"[i % 18] + "stuv"[i // 18]
    for i in range(VOCABULARY)
)
END, NAN, INFINITE = 2, 70, 71
"""The end token, and the tokens after which a row of logits holds nothing but NaN or infinity."""
DEFAULTS = ModelDefaults(
    vocab_size=VOCABULARY, bos_token_id=1, eos_token_ids=(END,), pad_token_id=None, context_length=4096
)

Fault = Literal["send", "choosing", "masking"]
FAULTS: tuple[Fault, ...] = ("send", "choosing", "masking")


class InjectedError(Exception):
    """What a part of a request raises that is made to fail."""


@dataclass
class OddOrEven:
    """A constraint: only every other token may come next, and end tokens. It raises after so many masks, if any."""

    taken: int = 0
    fails_after: list[int] = field(default_factory=list)

    def prepare(self) -> None:
        pass

    def permits(self, token: int) -> bool:
        self._fail_if_due()
        return token == END or token % 2 == self.taken % 2

    def mask(self, scores: NDArray[np.float32]) -> None:
        self._fail_if_due()
        end = scores[END]
        scores[1 - self.taken % 2 :: 2] = -np.inf
        scores[END] = end

    def forced(self, most: int) -> list[int]:
        return [2 + self.taken % 2][:most]  # it is not, but it may come

    def accept(self, token: int) -> None:
        assert self.permits(token)
        self.taken += 1

    def clone(self) -> Self:
        return dataclasses.replace(self)  # the list is shared: all copies count down together

    def _fail_if_due(self) -> None:
        if self.fails_after:
            self.fails_after[0] -= 1
            if self.fails_after[0] < 0:
                raise InjectedError("The constraint fails.")


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call of `HashContext.decode` that fails: which one, from 0; those of warm-ups count.

    `status` is what llama_decode returns: 1 leaves all as before; 2 and what is below -1 leave the tokens done so far.
    """

    decode: int
    status: int = -3
    done: int = 0
    lasting: bool = False
    context: int = 0


class Ask(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request, with the ``generate_kwargs`` of a request, and what happens to it.

    Attributes:
        arrives: the step before which it is submitted.
        after: the request whose first answer its prompt goes on from.
        leaves: steps after its arrival before which it is cancelled.
        constrained: whether its tokens must be odd and even in turns.
        schema: which of `tests.support.schemas.GRAMMARS` they must follow instead.
        logprobs, scored: how many log-probabilities it wants beside each token, and each token of its prompt.
        openai: parameters that only OpenAI's API has, beside `kwargs`.
        fault, fault_at: which of its parts fails, and how often that works before.
        entropy: what it is drawn with when it has no seed.
    """

    prompt: tuple[int, ...]
    kwargs: dict[str, Any]
    arrives: int = 0
    after: int | None = None
    stream: bool = True
    timeout: float | None = None
    leaves: int | None = None
    constrained: bool = False
    schema: int | None = None
    logprobs: int | None = None
    scored: int | None = None
    stops: tuple[str, ...] = ()
    openai: dict[str, Any] = {}
    fault: Fault | None = None
    fault_at: int = 0
    entropy: int = 0
    adapter: int = 0

    def config(self) -> GenerationConfig:
        config = GenerationConfig.resolve(self.kwargs, DEFAULTS)
        return dataclasses.replace(config, top_logprobs=self.logprobs, **self.openai)


@dataclass(frozen=True)
class Attention:
    """What tokens attend to, and with which rotary factors; the window includes the token itself, and is None for all.

    `window_chunk` tokens of a prompt are fed at a time beyond the window. `max_tokens` is the longest sequence with the
    first set of rotary factors, None when there is one set.
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


class Scenario(msgspec.Struct, frozen=True, omit_defaults=True):
    """An engine and its life. Sizes are in tokens, the host cache's in bytes (`TOKEN_BYTES` each), steps from 0.

    Attributes:
        cells: of each context, one or two.
        max_tokens: the longest sequence of the first context, or None; where there is but one, none is longer.
        scored: tokens of prompts that have logits in one batch, at most.
        per_step: how many bytes are copied to the host cache in a step.
        kept_sequences: ids beyond `parallel`, for finished sequences that stay in their cells.
        sizes: how long a batch of 1, 2, ... rows takes, so that some are padded or decoded in turn; none: all together.
            The first three together are the tokens of a tile.
        drafts: tokens that are drafted for each row, many of which are those that come.
        turn: how many batches an adapter has, while others wait.
        stop_at: the step before which the engine is stopped.
    """

    asks: tuple[Ask, ...]
    cells: tuple[int, ...] = (300,)
    max_tokens: int | None = None
    window: int | None = None
    window_chunk: int = 1
    parallel: int = 8
    batch_size: int = 64
    scored: int = 64
    share_prefixes: bool = True
    host_cache: int | None = None
    block_size: int = 16
    per_step: int = 1 << 20
    kept_sequences: int = 0
    exact_seeds: bool = False
    max_queue: int = 256
    offloaded: bool = False
    sizes: tuple[int, ...] = ()
    drafts: int = 0
    turn: int = 16
    failures: tuple[Failure, ...] = ()
    stop_at: int | None = None

    @property
    def attention(self) -> Attention:
        return Attention(self.window, self.window_chunk, self.max_tokens)

    @property
    def repeatable(self) -> bool:
        """Whether answers do not depend on what else runs."""
        return self.window is None or self.window_chunk == 1 or not (self.share_prefixes or self.host_cache)
