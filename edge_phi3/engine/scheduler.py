"""Who runs: admission, preemption and seeds, over all contexts of a model.

A model with two sets of rotary factors has two contexts. A sequence up to the original context is computed in the
first; when it grows beyond, all of it is computed anew in the second.

Room is computed here for every context that a request may visit, so that what is accepted always finishes. Requests are
admitted first come, first served for each context: none overtakes another that waits for the same one, so that a large
request waits only for those that came before it, and a small one behind it waits no longer than that. When cells run
out, the request of a context that came last goes back to its place in the queue, and is restored or recomputed later.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.errors import RequestTooLargeError
from edge_phi3.engine.model_runner import Batch, ModelRunner
from edge_phi3.engine.sequence import RunningRequest


class Scheduler:
    """The waiting and running requests of a model.

    `waiting` are those that hold no cells, in the order of their arrival; `preemptions` counts how often a request was
    sent back for want of cells.

    `runners` are the model's contexts, in the order of the lengths that they are for; the last takes any that its cells
    allow. Each decodes `parallel` sequences together at most. With `share_prefixes` a prompt may begin with what was
    computed for another, with `exact_seeds` a request with a seed has a cleared context to itself.
    """

    def __init__(
        self,
        runners: Sequence[ModelRunner],
        *,
        parallel: int,
        share_prefixes: bool = True,
        exact_seeds: bool = False,
    ) -> None:
        self.runners = list(runners)
        least = min(min(runner.context.sequences, runner.context.batch_size) for runner in runners)
        self.parallel = min(parallel, least)
        self.waiting: list[RunningRequest] = []
        self.preemptions = 0
        self._share = share_prefixes
        self.exact_seeds = exact_seeds

    @property
    def running(self) -> list[RunningRequest]:
        """The requests that hold cells, over all contexts."""
        return [request for runner in self.runners for request in runner.running]

    # -- room

    def room(self, prompt_length: int, rows: int, most: int) -> int:
        """Return how many tokens a prompt may be continued by in each of so many sequences, at most `most`."""
        longer = range(prompt_length + 1, prompt_length + most + 1)
        return bisect.bisect(longer, False, key=lambda length: self._obstacle(prompt_length, length, rows) is not None)

    def refuse_what_never_fits(self, request: RunningRequest) -> None:
        """Raise `RequestTooLargeError` for a request that this model's contexts can never take."""
        if request.rows > self.parallel:
            raise RequestTooLargeError(
                f"`n`, `num_beams` or `num_return_sequences` asks for {request.rows} sequences at once; "
                f"this server decodes at most {self.parallel}."
            )
        obstacle = self._obstacle(request.prompt_length, request.max_length, request.rows)
        if obstacle is not None:
            raise RequestTooLargeError(
                f"The request may need {obstacle[0]} KV cells ({request.prompt_length} prompt tokens, max_length "
                f"{request.max_length}, {request.rows} sequences); this server has {obstacle[1]}. "
                "Lower max_length or max_new_tokens."
            )

    def _obstacle(self, prompt_length: int, max_length: int, rows: int) -> tuple[int, int] | None:
        """Return the cells that are needed and those that there are in a context that is too small, or None."""
        longest = max(prompt_length, max_length - 1)  # the last token is not decoded
        for runner in self.runners[self._place(prompt_length) : self._place(longest) + 1]:
            last, limit = runner is self.runners[-1], runner.max_tokens or longest
            needed = runner.window.cells_needed(prompt_length, longest if last else min(longest, limit), rows)
            if needed > runner.kv.cells:
                return needed, runner.kv.cells
            if last and longest > limit:
                return longest, limit
        return None

    def _place(self, length: int) -> int:
        """Return the place of the context for sequences of `length` tokens."""
        for place, runner in enumerate(self.runners[:-1]):
            if runner.max_tokens is None or length <= runner.max_tokens:
                return place
        return len(self.runners) - 1

    # -- entering and leaving

    def enqueue(self, request: RunningRequest) -> None:
        """Put a request into the queue at its place by arrival."""
        bisect.insort(self.waiting, request, key=lambda waiting: waiting.arrival)

    def admit(self) -> None:
        """Let waiting requests run, while sequences and cells allow."""
        closed: set[int] = set()
        for request in self.waiting[:]:
            place = self._place(request.length)
            if place in closed:
                continue
            runner = self.runners[place]
            if self._may_enter(request, runner):
                self.waiting.remove(request)
                self._enter(request, runner)
            else:
                closed.add(place)
                if len(closed) == len(self.runners):
                    return

    def _may_enter(self, request: RunningRequest, runner: ModelRunner) -> bool:
        if not runner.running:
            return True
        if request.exact or runner.running[0].exact:
            return False
        rows = sum(running.rows for running in runner.running)
        if rows + request.rows > self.parallel:
            return False
        shared = runner.kv.shared_with_running(self._known_tokens(request))
        # It is to have room until it decodes, so that it is not preempted before: for all prompts that are not computed
        # or scored yet, and in each of the steps that these take for one token of every running row.
        prompts = max(0, self._cells_to_start(request, runner) - shared)
        prompts += sum(self._cells_missing(running, runner) for running in runner.running)
        unscored = request.unscored + sum(running.unscored for running in runner.running)
        steps = 2 + max(prompts // max(1, runner.context.batch_size - rows), unscored // runner.context.scored)
        return prompts + rows * steps + request.rows <= runner.kv.available

    def _cells_missing(self, request: RunningRequest, runner: ModelRunner) -> int:
        """Return the cells that a running request still takes until it decodes."""
        if request.decoding:
            return 0
        held = sum(sequence.computed - runner.kv.start[sequence.seq_id] for sequence in request.sequences)
        return max(0, self._cells_to_start(request, runner) - held)

    @staticmethod
    def _cells_to_start(request: RunningRequest, runner: ModelRunner) -> int:
        return runner.window.cells_needed(request.prompt_length, request.length, request.decoder.rows)

    def _enter(self, request: RunningRequest, runner: ModelRunner) -> None:
        if request.exact:
            runner.kv.make_room(runner.kv.cells)
            runner.kv.clear()
        request.stem = len(request.stem_tokens())
        request.batch = 0  # contexts number their batches apart: who comes from another one has waited longest
        request.sequences = [runner.kv.begin(self._known_tokens(request))]
        if request.started is None:
            request.cached_tokens = request.sequences[0].computed
        runner.running.append(request)

    def _known_tokens(self, request: RunningRequest) -> NDArray[np.int32]:
        """Return the tokens that a request may find computed before, for others or for itself.

        Cells have no logits, so a prompt that is to be scored begins with what has been scored of it at most.
        """
        if not self._share or request.exact or not request.request.config.cache_prompt:
            return request.request.prompt_ids[:0]
        return request.marked(request.stem_tokens()[: len(request.prompt_logprobs) if request.unscored else None])

    def retire(self, request: RunningRequest) -> None:
        """Take a request out."""
        if request in self.waiting:
            self.waiting.remove(request)
        for runner in self.runners:
            if request in runner.running:
                runner.leave(request)

    def forget(self, runner: ModelRunner) -> None:
        """Empty a context after a failure: every request that ran in it is recomputed."""
        for request in runner.running:
            request.sequences = []
            self.enqueue(request)
        runner.running.clear()
        runner.kv.clear(zero=True)

    # -- one step

    def plan(self, runner: ModelRunner) -> Batch:
        """Write the next batch of a context, making room for it where cells run out.

        It is empty where nothing runs, for one request alone always fits: `refuse_what_never_fits` has let it pass.
        """
        while runner.running:
            batch = runner.plan()
            if batch.count:
                return batch
            if len(runner.running) == 1:
                break
            youngest = max(runner.running, key=lambda request: request.arrival)
            self.retire(youngest)
            self.enqueue(youngest)
            self.preemptions += 1
        return Batch()
