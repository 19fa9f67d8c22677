"""Steps of a batch in which nothing changes but the tokens: planned once, and entered into the books at their end.

Between two decodes the processor's caches hold the model's weights and none of what surrounds them, so every line and
every object that a step touches is waited for. While the same requests decode, and choose in plain ways, a step here is
the decode call, the choice, and the next batch's tokens and positions. vLLM calls this multi-step scheduling.
"""

from __future__ import annotations

import math
from typing import Self

from edge_phi3.engine.batch import Plan
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import TokensEvent
from edge_phi3.generation.plain import PlainRows

_MOST_STEPS = 64
"""Steps after which the books are brought up to date in any case: metrics are read from them."""


class Streak:
    """Repeats a batch.

    Args:
        scheduler: whose books are kept.
        plan: the batch, one token of each of some requests with one sequence.
        rows: how the requests choose.
        most: steps at most, for which there are free cells.

    Attributes:
        requests: those in the batch.
        steps: how many steps were taken.
        deadline: the first time at which a request's limit passes, in seconds of `time.monotonic`.
    """

    def __init__(self, scheduler: Scheduler, plan: Plan, rows: PlainRows, most: int) -> None:
        self.requests = plan.choosing
        self.steps = 0
        limits = [request.deadline for request in (*scheduler.running, *scheduler.waiting)]
        self.deadline = min((limit for limit in limits if limit is not None), default=math.inf)
        self._scheduler = scheduler
        self._plan = plan
        self._rows = rows
        self._most = most
        self._chosen: list[list[int]] = []
        self._told = 0
        # A memory view costs a fraction of what NumPy's machinery costs a single number.
        self._tokens, self._positions = scheduler.context.tokens.data, scheduler.context.positions.data

    @classmethod
    def of(cls, scheduler: Scheduler, plan: Plan) -> Self | None:
        """Give the streak that begins with a planned batch; None when it is no use to repeat that."""
        requests = plan.choosing
        # One row each, none of them the end of a prompt: also a request that comes back has one.
        if not len(requests) == len(plan.places) == len(plan.chunks) == len(scheduler.running):
            return None
        if plan.order is not None:
            return None
        if any(request.first_token is None for request in requests):
            return None
        rows = PlainRows.of([request.decoder for request in requests])
        if rows is None:
            return None
        # The plan has taken the cells of the first step.
        most = min(_MOST_STEPS, rows.steps, 1 + (scheduler.kv.free - plan.padding) // len(requests))
        if scheduler.max_tokens is not None:
            most = min(most, scheduler.max_tokens - max(request.sequences[0].length for request in requests))
        return cls(scheduler, plan, rows, most) if most > 1 else None

    def step(self) -> bool:
        """Decode the batch, and choose each row's next token.

        Returns:
            Whether another step may follow.

        Raises:
            DecodeFailedError: llama.cpp failed.
        """
        scheduler, plan, writer = self._scheduler, self._plan, self._scheduler.writer
        if self._chosen:
            for place, token in zip(plan.places, self._chosen[-1], strict=True):
                self._tokens[place] = token
                self._positions[place] += 1
            if scheduler.window is not None:
                for request in self.requests:
                    sequence = request.sequences[0]
                    writer.trim(sequence, sequence.computed + self.steps)
        logits = writer.decode(plan)
        chosen = self._rows.choose(logits[: len(self.requests)])
        self._chosen.append(chosen)
        self.steps += 1
        return self.steps < self._most and not self._rows.ends(chosen)

    def tell(self) -> None:
        """Send the tokens that were chosen since the last time to those who stream."""
        new, self._told = self._chosen[self._told :], self.steps
        if not new:
            return
        for request, tokens in zip(self.requests, zip(*new, strict=True), strict=True):
            if request.request.stream:
                request.send(TokensEvent([(0, token) for token in tokens if token >= 0]))

    def settle(self) -> None:
        """Enter all steps into the requests and the books. Those that have ended are still to be retired."""
        self.tell()
        self._rows.accept(self._chosen)
        for request, tokens in zip(self.requests, zip(*self._chosen, strict=True), strict=True):
            self._scheduler.extend(request, tokens[:-1] if request.decoder.finished else tokens, self.steps)
