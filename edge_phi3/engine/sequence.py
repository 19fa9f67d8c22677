"""One request inside the engine: its parameters, its events, and the sequences that it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.drafting import Drafting
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.constrained import TokenConstraint
from edge_phi3.generation.decoding import Decoder, GenerationResult, TokenLogprobs, token_logprobs
from edge_phi3.generation.logits import Scores
from edge_phi3.generation.stopping import StopTexts


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request to the engine.

    Attributes:
        prompt_ids: token ids of the prompt, int32, shape ``(prompt_tokens,)``, at least one.
        config: the resolved generation parameters.
        stream: whether `TokensEvent`s are wanted; without them only the `FinishedEvent` is sent.
        timeout: seconds from submission after which the request fails with `DeadlineExceededError`, or None.
        request_id: what logs call this request.
        constraint: what its sequences are held to, or None.
        stop_texts: what ends a sequence by its text beside the configuration's ``stop_strings``, or None.
        scored_prompt: how many likeliest tokens are wanted beside each token of the prompt; None for no scores.
        adapter: the number of the adapter that it is computed with, from 1, or 0 for none.
    """

    prompt_ids: NDArray[np.int32]
    config: GenerationConfig
    stream: bool = False
    timeout: float | None = None
    request_id: str = ""
    constraint: TokenConstraint | None = None
    stop_texts: StopTexts | None = None
    scored_prompt: int | None = None
    adapter: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from submission: to the first step with a token of the prompt, to the first new token, to the end."""

    queue: float
    first_token: float
    total: float


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """Tokens chosen in one step: pairs of the returned sequence's index and the token id, in order; none in beam modes.

    `logprobs` has one for each of them, when the request wants them.
    """

    tokens: list[tuple[int, int]]
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end of a request, and everything it produced.

    Attributes:
        result: sequences (prompt included), scores, finish reasons.
        cached_tokens: how many tokens of the prompt came from the prefix cache.
        generated_tokens: tokens generated, over all returned sequences.
        drafted_tokens: tokens that were drafted for them; `accepted_tokens` are those that the model chose.
        prompt_logprobs: of each token of the prompt but the first, when the request wants them, else empty.
    """

    result: GenerationResult
    timing: Timing
    cached_tokens: int
    generated_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


ADAPTER_SHIFT = 20
"""No vocabulary has so many bits in its tokens' ids; above them there is room for the numbers of 2047 adapters."""

Event = TokensEvent | FinishedEvent | BaseException
"""What the engine sends to a request's owner: an exception or a `FinishedEvent` is the last one."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One llama.cpp sequence of a running request.

    `computed` tokens are in the KV cache (positions dropped by the sliding window included); `scattered` of them were
    decoded beside other sequences, so that their cells lie apart.
    """

    seq_id: int
    computed: int = 0
    scattered: int = 0


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request that the engine has accepted. Its tokens are in its decoder's history.

    Attributes:
        send: hands one event to the owner; called from the engine's thread, and must not block.
        arrival: order of arrival, which decides who is admitted first and who is preempted last.
        submitted: when it was submitted, as all times here in seconds of the engine's clock.
        exact: whether it runs alone in a cleared context, so that its answer repeats to the bit.
        sequences: those in the context where it runs: none while it waits, one until its `stem`, what its rows have in
            common, is computed, and then one for each row.
        batch: the number of the last batch in its context that took its rows, where they take turns.
        started: when it was first in a batch, or None; `first_token`: when that was chosen, or None.
        cached_tokens: tokens of the prompt that were found in the prefix cache.
        prompt_logprobs: those of the prompt that are known so far, where they are wanted.
        failed: whether an error of ours, or of its parameters, has ended it.
    """

    request: GenerationRequest
    decoder: Decoder
    send: Callable[[Event], None]
    arrival: int
    submitted: float
    exact: bool = False
    sequences: list[Sequence] = field(default_factory=list)
    stem: int = 0
    batch: int = 0
    started: float | None = None
    first_token: float | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    drafting: Drafting = field(default_factory=Drafting)
    cancelled: bool = False
    failed: bool = False

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens of each of its rows, those included that are still to be decoded."""
        return self.decoder.history.length

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
        """Whether every row has been computed but for the token that was chosen last."""
        before = self.decoder.history.length - 1
        for sequence in self.sequences:
            if sequence.computed != before:
                return False
        return len(self.sequences) == self.decoder.rows

    def stem_tokens(self) -> NDArray[np.int32]:
        """Return what all rows begin with, shape ``(tokens,)``; their last tokens are decoded in any case."""
        rows = self.decoder.row_tokens()[:, :-1]
        same = (rows == rows[0]).all(axis=0) if len(rows) > 1 else np.ones(0, np.bool_)
        stem: NDArray[np.int32] = rows[0, : rows.shape[1] if same.all() else int(same.argmin())]
        return stem

    def marked(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return tokens as the caches know them: with each adapter the first is another, so that none shares any."""
        if self.request.adapter and len(tokens):
            tokens = tokens.copy()
            tokens[0] += self.request.adapter << ADAPTER_SHIFT
        return tokens

    @property
    def unscored(self) -> int:
        """How many tokens of the prompt are still to have logits, each for the log-probability of the next."""
        wanted = self.request.scored_prompt is not None
        return self.prompt_length - 1 - len(self.prompt_logprobs) if wanted else 0

    def score(self, logits: Scores) -> None:
        """Take the logits of the next tokens of the prompt that are to have some, shape ``(tokens, vocab_size)``."""
        known, top = len(self.prompt_logprobs), self.request.scored_prompt
        assert top is not None
        following = self.request.prompt_ids[known + 1 : known + 1 + len(logits)]
        self.prompt_logprobs += token_logprobs(logits, following.tolist(), top)

    def finished(self, now: float) -> FinishedEvent:
        """Return the last event of a request whose tokens are all chosen."""
        result = self.decoder.result()
        generated = sum(len(sequence) - self.prompt_length for sequence in result.sequences)
        assert self.started is not None
        assert self.first_token is not None
        return FinishedEvent(
            result,
            Timing(self.started - self.submitted, self.first_token - self.submitted, now - self.submitted),
            self.cached_tokens,
            generated,
            self.drafting.drafted,
            self.drafting.held,
            self.prompt_logprobs,
        )

    def follows(self, draft: NDArray[np.int32], place: int) -> bool:
        """Return whether its rows have all gone on by the token at `place` of a draft, and are to go on."""
        if place >= draft.shape[1] or self.decoder.finished or len(self.sequences) != len(draft):
            return False
        last: list[int] = draft[:, place].tolist()
        return self.decoder.last_tokens() == last
