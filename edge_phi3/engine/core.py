"""All that the engine's thread does: take what arrives, and one step after the other.

`EngineCore.step` is the whole story. A context that has work plans a batch, decodes it, chooses tokens for all its rows
at once, and continues or ends their requests.
"""

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edge_phi3.engine.errors import DeadlineExceededError, EngineStoppedError, QueueFullError
from edge_phi3.engine.events import EventBatcher
from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.model_runner import Batch, ModelRunner
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import Event, GenerationRequest, RunningRequest, TokensEvent
from edge_phi3.engine.stats import Times, Totals
from edge_phi3.errors import InternalError
from edge_phi3.generation import make_decoder
from edge_phi3.generation.decoding import Step, advance
from edge_phi3.generation.logits import Scores
from edge_phi3.generation.processors import Tokens
from edge_phi3.llama import DecodeFailedError

logger = logging.getLogger(__name__)


class EngineCore:
    """The engine without its thread. What stands first is for any thread, the rest for one.

    `outbox` is what the requests' `send` functions fill; it is flushed here. `token_texts` returns the text of every
    token, which stop strings are compared with; `clock` returns seconds that only grow.

    Attributes:
        steps: batches decoded, in `turns` calls of `step` that have returned.
        totals: tokens so far.
        device_times: how long batches took from launch to logits; `host_times`: what their steps took beside.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        outbox: EventBatcher,
        *,
        max_queue: int = 256,
        token_texts: Callable[[], Sequence[str | None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.steps = self.turns = 0
        self.totals = Totals()
        self.device_times, self.host_times = Times(), Times()
        self._outbox = outbox
        self._max_queue = max_queue
        self._token_texts = token_texts
        self._clock = clock
        self._arrivals = itertools.count()
        self._inbox: queue.SimpleQueue[RunningRequest | None] = queue.SimpleQueue()
        self._in_flight: set[RunningRequest] = set()
        self._chosen: list[tuple[RunningRequest, Step, float]] = []
        """What the last batch chose for whom, and when: sent while the next one is decoded."""
        self._failed: list[RunningRequest] = []
        """Requests that failed in this step, whose tokens a batch may hold that is being decoded."""
        self._lock = threading.Lock()
        self._closed: str | None = None
        self._aborted = False

    # -- from any thread

    @property
    def in_flight(self) -> int:
        """How many accepted requests have not ended."""
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        """How many accepted requests hold no cells."""
        unaware = len({request for request, _, _ in self._chosen if request.decoder.finished})
        return max(0, len(self._in_flight) - len(self.scheduler.running) - unaware)

    def submit(self, request: GenerationRequest, send: Callable[[Event], None]) -> RunningRequest:
        """Queue a request. `send` gets its events, in the thread that calls `step`, and one of them ends it."""
        texts = self._token_texts() if self._token_texts and request.config.stop_strings else None
        decoder = make_decoder(
            request.config,
            request.prompt_ids,
            vocabulary=texts,
            stop_texts=request.stop_texts,
            constraint=request.constraint,
            clock=self._clock,
        )
        exact = self.scheduler.exact_seeds and request.config.seed is not None
        running = RunningRequest(request, decoder, send, next(self._arrivals), self._clock(), exact)
        self.scheduler.refuse_what_never_fits(running)
        with self._lock:
            if self._closed is not None:
                raise EngineStoppedError(self._closed)
            if self.waiting >= self._max_queue:
                raise QueueFullError(f"The queue is full ({self._max_queue} requests wait); try again later.")
            self._in_flight.add(running)
            self._inbox.put(running)
        return running

    def cancel(self, request: RunningRequest) -> None:
        """Cancel a request; its sequences are freed in the next step."""
        request.cancelled = True
        self.wake()

    def abandon(self, reason: str) -> None:
        """End every request with an error although the thread that steps does not answer."""
        for request in list(self._in_flight):
            self._end(request, InternalError(reason))
            request.cancelled = True
        self._outbox.flush()

    def wake(self) -> None:
        """Let `wait` return."""
        self._inbox.put(None)

    def abort(self) -> None:
        """Let the running call of `step` or `wait` return soon; `stop` is to follow."""
        self._aborted = True
        for runner in self.scheduler.runners:
            runner.context.abort()
        self.wake()

    # -- from the engine's thread

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._in_flight or self.scheduler.waiting or self.scheduler.running or self._untidy)

    def wait(self, idle: Callable[[], None]) -> None:
        """Wait until something arrives, and call `idle` when nothing has for a second."""
        try:
            self._take(self._inbox.get(timeout=1.0))
        except queue.Empty:
            idle()
            self._take(self._inbox.get())

    def step(self) -> None:
        """Let every request that runs go on by one token, or by a part of its prompt."""
        started, before, steps = time.perf_counter(), self.device_times.total, self.steps
        while not self._inbox.empty():
            self._take(self._inbox.get_nowait())
        self._drop_the_departed()
        self.scheduler.admit()
        for runner in self.scheduler.runners:
            batch = self.scheduler.plan(runner)
            if batch.count:
                self._decode(runner, batch)
            elif runner.running:
                self._fail(runner.running[0], "it does not fit the cache that it was admitted to")
        self._tidy_up()
        if self.steps > steps:
            self.host_times.add(time.perf_counter() - started - (self.device_times.total - before))
        self.turns += 1

    def stop(self, detail: str) -> None:
        """Take no more requests, and end those that are there."""
        with self._lock:
            self._closed = detail
        # Who has finished, but has not heard of it, has an answer.
        self._chosen = [chosen for chosen in self._chosen if chosen[0].decoder.finished]
        self._deliver()
        for request in list(self._in_flight):
            self._end(request, EngineStoppedError(detail))
        while not self._inbox.empty():
            self._inbox.get_nowait()
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.retire(request)
        self._outbox.flush()

    def _take(self, request: RunningRequest | None) -> None:
        if request is not None:
            self.totals.prompt += request.prompt_length
            self.scheduler.enqueue(request)

    def _drop_the_departed(self) -> None:
        now = self._clock()
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            timeout = request.request.timeout
            if request.cancelled:
                self.scheduler.retire(request)
                self._end(request, None)
            elif timeout is not None and now > request.submitted + timeout:
                self.scheduler.retire(request)
                self._end(request, DeadlineExceededError(f"The request's time limit of {timeout:g} s has passed."))

    def _decode(self, runner: ModelRunner, batch: Batch) -> None:
        now = self._clock()
        for request in batch.members:
            if request.started is None:
                request.started = now
                self.totals.cached += request.cached_tokens
        launched = time.perf_counter()
        try:
            logits = runner.decode(batch, beside=lambda: self._deliver(batch.choosing))
        except DecodeFailedError as error:
            self._recover(runner, batch, error)
            return
        self.device_times.add(time.perf_counter() - launched)
        self.steps += 1
        if batch.scored:
            logits = self._score(batch, logits)
        drafted = len(logits) - batch.drafted
        self._choose(runner, batch.choosing, logits[:drafted])
        if batch.drafts:
            self._check_drafts(runner, batch.drafts, logits[drafted:])

    def _choose(self, runner: ModelRunner, requests: Sequence[RunningRequest], logits: Scores) -> None:
        chosen = advance([request.decoder for request in requests], logits)
        now = self._clock()
        for request, step in zip(requests, chosen, strict=True):
            if request.failed:
                continue
            try:
                self._continue(runner, request, step, now)
            except Exception as error:  # noqa: BLE001 - it is logged
                self._fail(request, "it cannot go on", error)

    def _check_drafts(self, runner: ModelRunner, drafts: Mapping[RunningRequest, Tokens], logits: Scores) -> None:
        """Let requests go on through what was drafted for them, as long as it is what their own choices are."""
        parts = np.split(logits, np.cumsum([draft.size for draft in drafts.values()]))
        rows = {
            request: part.reshape(*draft.T.shape, -1)
            for (request, draft), part in zip(drafts.items(), parts, strict=False)
        }
        held, going = dict.fromkeys(drafts, 0), list(drafts)
        while going := [request for request in going if request.follows(drafts[request], held[request])]:
            following = np.concatenate([rows[request][held[request]] for request in going])
            for request in going:
                runner.accept(request)
                held[request] += 1
            self._choose(runner, going, following)
        for request, draft in drafts.items():
            runner.judge(request, draft, held[request])

    def _score(self, batch: Batch, logits: Scores) -> Scores:
        """Make log-probabilities of the logits of prompts, and return those that tokens are chosen from."""
        scored: list[int] = []
        for request, first, count in batch.scored:
            scored += range(first, first + count)
            try:
                request.score(logits[first : first + count])
            except Exception as error:  # noqa: BLE001 - it is logged
                self._fail(request, "its prompt cannot be scored", error)
        return np.delete(logits, scored, axis=0)

    def _continue(self, runner: ModelRunner, request: RunningRequest, step: Step, now: float) -> None:
        """Continue a request's sequences with what its decoder chose, or finish them."""
        self._chosen.append((request, step, now))
        if request.decoder.finished:
            request.failed = request.decoder.error is not None
            self.scheduler.retire(request)
            return
        runner.reorder(request, step.parents)
        if runner.max_tokens is not None and request.length > runner.max_tokens:
            # Beyond the original context every position is scaled by the long factors, so all is computed anew.
            self.scheduler.retire(request)
            self.scheduler.enqueue(request)

    def _deliver(self, choosing: Sequence[RunningRequest] = ()) -> None:
        """Send what the last batch chose, and prepare for the next choice.

        The event loop, which this wakes, would take the interpreter lock from this thread while it plans or chooses; it
        works beside llama.cpp, which does not hold it.
        """
        chosen, self._chosen = self._chosen, []
        for request, step, now in chosen:
            if request not in self._in_flight:
                continue
            try:
                self._send(request, step, now)
            except Exception as error:  # noqa: BLE001 - it is logged
                self._fail(request, "it cannot be answered", error)
        self._outbox.flush_if_due()
        for request in choosing:
            try:
                request.decoder.prepare()
            except Exception as error:  # noqa: BLE001 - it is logged
                self._fail(request, "its format cannot be followed", error)

    def _send(self, request: RunningRequest, step: Step, now: float) -> None:
        if request.first_token is None:
            request.first_token = now
            self._outbox.urgent = True
        if request.request.stream and step.emitted:
            request.send(TokensEvent([*step.emitted], [*step.logprobs]))
        if not step.parents:
            self._end(request, request.decoder.error or self.totals.add(request.finished(now)))

    def _end(self, request: RunningRequest, event: Event | None) -> None:
        """Send the last event of a request, unless somebody has."""
        with self._lock:
            if request not in self._in_flight:
                return
            self._in_flight.remove(request)
        if event is not None:
            try:
                request.send(event)
            except Exception:
                logger.exception("The end of request %s cannot be sent.", request.request.request_id)

    def _fail(self, request: RunningRequest, why: str, error: Exception | None = None) -> None:
        logger.error("Request %s fails: %s.", request.request.request_id, why, exc_info=error)
        request.failed = True
        self._failed.append(request)
        self._end(request, InternalError())

    def _recover(self, runner: ModelRunner, batch: Batch, error: DecodeFailedError) -> None:
        """Fail the requests of a batch that could not be decoded; the others go on in a clean context."""
        if self._aborted:
            return
        logger.error("%s Its requests fail; the others are computed anew.", error)
        for request in batch.members:
            runner.running.remove(request)
            self._end(request, DecodeFailedError(str(error)))
        self.scheduler.forget(runner)
        runner.context.warm_up()

    def _tidy_up(self) -> None:
        """Free cells of those who have finished; they hear of it first."""
        untidy = self._untidy
        if untidy or not self.scheduler.running:
            self._deliver()
            self._outbox.flush()
        while self._failed:
            self.scheduler.retire(self._failed.pop())
        for kv in untidy:
            kv.tidy()

    @property
    def _untidy(self) -> list[KVCache]:
        return [runner.kv for runner in self.scheduler.runners if runner.kv.untidy]
