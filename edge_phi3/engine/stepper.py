"""Steps: every running request of a context goes on by one token, or by one chunk of its prompt.

`Stepper.step` tells the whole story of a step: who has left is dropped, who fits is admitted, a batch is planned and
decoded, tokens are chosen for all its rows at once, sent, and who is done is retired.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from edge_phi3.engine.delivery import Outbox
from edge_phi3.engine.errors import DeadlineExceededError, DecodeFailedError
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import FinishedEvent, RunningRequest, Timing, TokensEvent
from edge_phi3.engine.streak import Streak
from edge_phi3.generation.decoding import Step, advance

logger = logging.getLogger(__name__)


class Stepper:
    """Takes the steps. Used by the engine's thread alone; the counters may be read from any.

    Args:
        outbox: where events wait to be delivered.
        enqueue: puts a request into the queue of the context for sequences of some length.
        wanted: says whether somebody wants something from the engine's thread.
        stopping: says whether the engine is stopping.

    Attributes:
        cached_tokens: prompt tokens found in the prefix cache, over all requests.
        generated_tokens: tokens generated, over all finished requests.
        steps: decode calls.
    """

    def __init__(
        self,
        outbox: Outbox,
        enqueue: Callable[[RunningRequest, int], None],
        *,
        wanted: Callable[[], bool],
        stopping: Callable[[], bool],
    ) -> None:
        self.cached_tokens = self.generated_tokens = self.steps = 0
        self._outbox = outbox
        self._enqueue = enqueue
        self._wanted = wanted
        self._stopping = stopping

    def step(self, scheduler: Scheduler, *, repeat: bool) -> None:
        """Let every running request of a context go on by one token, or by one chunk of its prompt.

        Args:
            scheduler: the context's.
            repeat: whether to go on with the same batch as long as nobody wants anything else.
        """
        self._drop_the_departed(scheduler)
        scheduler.admit()
        for members in scheduler.batches():
            self._step(scheduler, members, repeat=repeat)

    def _step(self, scheduler: Scheduler, members: list[RunningRequest], *, repeat: bool) -> None:
        """Plan one batch, decode it, choose tokens for all its rows at once, send them, and retire who is done."""
        plan = scheduler.plan(members)
        if plan.count == 0:
            return
        now = time.monotonic()
        for request in members:
            if request.started is None:
                request.started = now
                self.cached_tokens += request.cached_tokens
        # Only now: the event loop would take the interpreter lock from this thread while it plans. It works beside
        # llama.cpp, which does not hold it.
        self._outbox.flush_if_due(now)
        streak = Streak.of(scheduler, plan) if repeat else None
        if streak is not None:
            self._go_on(scheduler, streak)
            return
        try:
            logits = scheduler.writer.decode(plan)
        except DecodeFailedError as error:
            failed = {id(sequence) for sequence, _ in plan.chunks}
            requests = [request for request in members if not failed.isdisjoint(map(id, request.sequences))]
            self._recover(scheduler, requests, error)
            return
        self.steps += 1
        scheduler.computed(plan)
        steps = advance([request.decoder for request in plan.choosing], logits)
        now = time.monotonic()
        for request, chosen in zip(plan.choosing, steps, strict=True):
            self._apply(scheduler, request, chosen, now)

    def _go_on(self, scheduler: Scheduler, streak: Streak) -> None:
        """Take the steps of a streak until it ends, somebody arrives or leaves, or a time limit passes."""
        try:
            while streak.step() and not self._wanted():
                now = time.monotonic()
                if now > streak.deadline:
                    break
                if self._outbox.is_due(now):
                    streak.tell()
                    self._outbox.flush()
        except DecodeFailedError as error:
            self._recover(scheduler, streak.requests, error)
            return
        self.steps += streak.steps
        streak.settle()
        now = time.monotonic()
        for request in streak.requests:
            if request.decoder.finished:
                self._finish(scheduler, request, now)

    def _apply(self, scheduler: Scheduler, request: RunningRequest, chosen: Step, now: float) -> None:
        """Send what a request's decoder chose, and continue or finish its sequences."""
        if request.first_token is None:
            request.first_token = now
            self._outbox.urgent = True
        if request.request.stream and chosen.emitted:
            request.send(TokensEvent([*chosen.emitted], [*chosen.logprobs]))
        if request.decoder.finished:
            self._finish(scheduler, request, now)
            return
        scheduler.reorder(request, chosen.parents, chosen.tokens)
        request.generated += len(chosen.tokens)
        if scheduler.max_tokens is not None and request.sequences[0].length > scheduler.max_tokens:
            # Phi-3-128k: beyond its original context every position is scaled by the long factors, so all is
            # recomputed.
            scheduler.retire(request)
            self._enqueue(request, request.sequences[0].length)

    def _finish(self, scheduler: Scheduler, request: RunningRequest, now: float) -> None:
        scheduler.retire(request)
        if request.decoder.error is not None:
            request.send(request.decoder.error)
            return
        result = request.decoder.result()
        generated = sum(len(sequence) - request.prompt_length for sequence in result.sequences)
        self.generated_tokens += generated
        submitted = request.submitted
        timing = Timing(
            queue=(request.started or now) - submitted,
            first_token=(request.first_token or now) - submitted,
            total=now - submitted,
        )
        request.send(FinishedEvent(result, timing, request.cached_tokens, generated))

    def _drop_the_departed(self, scheduler: Scheduler) -> None:
        now = time.monotonic()
        for request in [*scheduler.running, *scheduler.waiting]:
            deadline = request.deadline
            if request.cancelled:
                scheduler.retire(request)
            elif deadline is not None and now > deadline:
                scheduler.retire(request)
                request.send(
                    DeadlineExceededError(f"The request's time limit of {request.request.timeout:g} s has passed.")
                )

    def _recover(self, scheduler: Scheduler, failed: list[RunningRequest], error: DecodeFailedError) -> None:
        """Fail the requests of a batch that llama.cpp could not decode; the others go on with a clean context."""
        if self._stopping():
            return
        logger.error("%s Its requests fail; the others are computed anew.", error)
        for request in failed:
            scheduler.running.remove(request)
            request.send(error)
        scheduler.forget()
        scheduler.context.warm_up()
