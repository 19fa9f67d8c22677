"""Those who ask an engine: what they send, what they are told, and whether that is what they must be told."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.errors import DeadlineExceededError, EngineStoppedError, QueueFullError, RequestTooLargeError
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest, RunningRequest, TokensEvent
from edge_phi3.errors import InternalError
from edge_phi3.generation import GenerationError, GenerationResult
from edge_phi3.generation.constrained import TokenConstraint
from edge_phi3.generation.stopping import StopTexts
from edge_phi3.llama import DecodeFailedError
from tests.support.cores import Foreseen
from tests.support.reference import Answer, answer, fixed_entropy
from tests.support.scenarios import END, TEXTS, Ask, InjectedError, OddOrEven, Scenario
from tests.support.schemas import GRAMMARS, small_vocabulary

_BYTES = [(text or "").encode() for text in TEXTS]
LONGEST_REPEATED = 90
"""Tokens of an earlier answer that a prompt goes on from, at most."""


class Client:
    """One request of a scenario; `others` are the clients before it.

    Attributes:
        running, refusal: the request once it is accepted, or why it was refused.
        events: what it was told, or was to be told when its `send` raised, with the times.
        late: what it was told after its end.
        fired: whether its fault has occurred.
    """

    def __init__(
        self, number: int, ask: Ask, scenario: Scenario, others: Sequence[Client], clock: Callable[[], float]
    ) -> None:
        self.number, self.ask = number, ask
        self._scenario, self._clock = scenario, clock
        before = others[ask.after].expected.result if ask.after is not None else None
        whole: Sequence[int] = [] if before is None else before.sequences[ask.entropy % len(before.sequences)].tolist()
        start = whole[:LONGEST_REPEATED]
        self.prompt = np.array([*start, *ask.prompt], np.int32)
        self.config = ask.config()
        self.running: RunningRequest | None = None
        self.refusal: Exception | None = None
        self.events: list[tuple[float, Event]] = []
        self.late: list[Event] = []
        self.submitted = 0.0
        self.cancelled = self.fired = False
        self._left = [ask.fault_at]

    def submit(self, core: EngineCore) -> None:
        self.submitted = self._clock()
        in_flight, request = core.in_flight, self._request(faulty=True)
        try:
            with fixed_entropy(self.ask.entropy):
                self.running = core.submit(request, self.send)
        except Exception as error:  # noqa: BLE001 - all kinds are looked at
            self.refusal = error
            self._check_refusal(error, in_flight)
            return
        self.running.drafting = Foreseen(
            lambda: None if (result := self.expected.result) is None else result.sequences, wrong=END
        )
        if self.ask.fault == "choosing":
            decoder = self.running.decoder
            decoder.processors = (*decoder.processors, self._break)

    def _request(self, *, faulty: bool) -> GenerationRequest:
        ask = self.ask
        constraint: TokenConstraint | None = None
        if ask.schema is not None:
            constraint = small_vocabulary().constrain(GRAMMARS[ask.schema], [END])
        elif ask.constrained:
            constraint = OddOrEven(fails_after=self._left if faulty and ask.fault == "masking" else [])
        name = f"r{self.number}"
        stops = StopTexts(ask.stops, _BYTES, len(self.prompt)) if ask.stops else None
        return GenerationRequest(
            self.prompt, self.config, ask.stream, ask.timeout, name, constraint, stops, ask.scored, ask.adapter
        )

    def _break(self, _tokens: object, _scores: object) -> None:
        self._left[0] -= 1
        if self._left[0] < 0:
            raise InjectedError("A logits processor fails.")

    def send(self, event: Event) -> None:
        self.late += [event] * self.ended
        self.events.append((self._clock(), event))
        if self.ask.fault == "send" and len(self.events) > self.ask.fault_at:
            self.fired = True
            raise InjectedError("Nobody listens.")

    @functools.cached_property
    def expected(self) -> Answer:
        """How the request must end when nothing happens to it."""
        return answer(self._request(faulty=False), self._scenario.attention, entropy=self.ask.entropy)

    @property
    def accepted(self) -> bool:
        return self.running is not None

    @property
    def ended(self) -> bool:
        return bool(self.events) and not isinstance(self.events[-1][1], TokensEvent)

    @property
    def in_flight(self) -> bool:
        return self.accepted and not self.ended and not self.cancelled

    @property
    def final(self) -> Event | None:
        return self.events[-1][1] if self.ended else None

    @property
    def rows(self) -> int:
        return max(self.config.num_beams, self.config.num_return_sequences)

    @property
    def length(self) -> int:
        return self.config.total_length(len(self.prompt))

    def holds(self, position: int, token: int) -> bool:
        assert self.running is not None
        tokens = self.running.decoder.history.tokens
        drafting = self.running.drafting
        if isinstance(drafting, Foreseen) and len(drafting.last) == len(tokens):
            tokens = np.hstack([tokens, drafting.last])
        return position < tokens.shape[1] and token in tokens[:, position].tolist()

    def _check_refusal(self, error: Exception, in_flight: int) -> None:
        assert str(error), f"{type(error).__name__} says nothing"
        scenario, number = self._scenario, self.number
        if isinstance(error, RequestTooLargeError):
            assert not self._surely_fits(), f"request {number} fits, but is refused: {error}"
        elif isinstance(error, QueueFullError):
            assert in_flight >= scenario.max_queue, f"request {number} is refused with {in_flight} in flight: {error}"
            assert f"({scenario.max_queue} requests wait)" in str(error), f"request {number}: {error}"
        elif not isinstance(error, EngineStoppedError):
            try:
                _ = self.expected
            except Exception as same:  # noqa: BLE001 - it is compared
                assert type(same) is type(error), f"request {number} is refused: {error!r}"  # noqa: PT017
            else:
                raise error

    def _surely_fits(self) -> bool:
        scenario, prompt, rows = self._scenario, len(self.prompt), self.rows
        if rows > min(scenario.parallel, scenario.batch_size):
            return False
        attention, contexts = scenario.attention, len(scenario.cells)
        if attention.rotary(self.length - 1) >= contexts:  # the last token is not decoded
            return False
        for context in range(attention.rotary(prompt), min(contexts, attention.rotary(self.length) + 1)):
            last = context == contexts - 1
            longest = self.length if last or scenario.max_tokens is None else scenario.max_tokens
            needed = prompt + rows * (longest - prompt)
            if scenario.window is not None:
                needed = min(needed, rows * (scenario.window + scenario.window_chunk))
            if needed + rows + 1 > scenario.cells[context]:
                return False
        return True

    def check_events(self) -> None:
        name = f"request {self.number}"
        assert not self.late, f"{name} is told {self.late} after its end"
        if self.ask.fault in ("choosing", "masking") and self._left[0] < 0:
            self.fired = True
        final, config = self.final, self.config
        for time, event in self.events:
            late = time - self.submitted - (self.ask.timeout or math.inf)
            # What was whole, or had failed, in time is sent in the next step.
            if isinstance(final, FinishedEvent):
                late = final.timing.total - (self.ask.timeout or math.inf)
            elif isinstance(final, InternalError | GenerationError):
                late -= 1
            assert late <= 0 or not isinstance(event, TokensEvent | FinishedEvent), f"{name} is answered too late"
        pairs = [pair for _, event in self.events if isinstance(event, TokensEvent) for pair in event.tokens]
        assert not pairs or (self.ask.stream and not config.is_beam_search), f"{name} did not want to be told tokens"
        if not isinstance(final, FinishedEvent):
            assert final is None or isinstance(final, BaseException), f"{name} ends with {final!r}"
            if final is not None:
                self._check_error(final)
        else:
            assert not self.fired or self.ask.fault == "send", f"{name} ends as if nothing had failed in it"
            self._check_finished(final)
        if self._scenario.repeatable and pairs:
            expected = self.expected.emitted[: len(pairs)]
            assert pairs == expected, f"{name} is told {pairs}, not {expected}"
            whole = config.max_time is not None or not isinstance(final, FinishedEvent)
            assert whole or len(pairs) == len(self.expected.emitted), f"{name} is not told all its tokens"

    def _check_error(self, error: BaseException) -> None:
        name = f"request {self.number}"
        if isinstance(error, GenerationError) and (not self.fired or self.ask.fault == "send"):
            expected = None if not self._scenario.repeatable else self.expected.error
            # Of beams that time has cut off, fewer may be possible than of those that went on to their end.
            cut = self.config.max_time is not None and self.config.is_beam_search and " of the " in str(error)
            fails = cut or not self._scenario.repeatable or repr(expected) == repr(error)
            assert fails, f"{name} fails with {error!r}, not {self.expected}"
        elif isinstance(error, DeadlineExceededError):
            timeout = self.ask.timeout
            assert timeout is not None, f"{name} has no time limit"
            assert self.events[-1][0] > self.submitted + timeout, f"{name} ends before its time limit"
            assert f" {timeout:g} s " in str(error), f"{name} is not told its time limit: {error}"
        else:
            allowed = (DecodeFailedError, EngineStoppedError)
            why = isinstance(error, allowed) or (self.fired and isinstance(error, InternalError))
            assert why, f"{name} ends with {error!r} for no reason"

    def _check_finished(self, event: FinishedEvent) -> None:
        name, result, prompt = f"request {self.number}", event.result, self.prompt.tolist()
        sequences = [sequence.tolist() for sequence in result.sequences]
        assert event.generated_tokens == sum(map(len, sequences)) - len(prompt) * len(sequences)
        assert 0 <= event.timing.queue <= event.timing.first_token <= event.timing.total, f"{name}: {event.timing}"
        assert 0 <= event.cached_tokens < len(prompt), f"{name}: {event.cached_tokens} tokens are cached"
        reused = self._scenario.share_prefixes and not (self._scenario.exact_seeds and self.config.seed is not None)
        reused = reused and self.ask.scored is None and self.config.cache_prompt
        assert reused or event.cached_tokens == 0, f"{name} began with what was computed for another"
        count = len(prompt) - 1 if self.ask.scored is not None else 0
        assert len(event.prompt_logprobs) == count, f"{name}: {event.prompt_logprobs}, {count} are wanted"
        assert all(sequence[: len(prompt)] == prompt for sequence in sequences), f"{name} lost its prompt"
        if not self._scenario.repeatable:
            return
        scored, right = event.prompt_logprobs, self.expected.prompt_logprobs
        assert _same(scored, right), f"{name} has a prompt of {scored}, not {right}"
        expected = self.expected.result
        if self.config.max_time is not None:
            if expected is not None and not self.config.is_beam_search:
                for sequence, whole in zip(sequences, expected.sequences, strict=True):
                    assert sequence == whole[: len(sequence)].tolist(), f"{name} has {sequence}, not {whole}"
            return
        assert expected is not None, f"{name} has {sequences}, but must fail: {self.expected.error!r}"
        wanted = [sequence.tolist() for sequence in expected.sequences]
        assert sequences == wanted, f"{name} (prompt {len(prompt)}) has {sequences}, not {wanted}"
        assert result.finish_reasons == expected.finish_reasons, f"{name}: {result.finish_reasons}"
        assert _same(_numbers(result), _numbers(expected)), f"{name}: {_numbers(result)}, not {_numbers(expected)}"


def _numbers(result: GenerationResult) -> list[Any]:
    return [result.sequences_scores, result.scores, result.logprobs]


def _same(left: Any, right: Any) -> bool:
    """Compare nested lists of numbers, these within their rounding."""
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float):
        return bool(np.isclose(left, right, rtol=1e-5, atol=1e-5, equal_nan=True))
    return bool(left == right)
