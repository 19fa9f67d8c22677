"""Which tokens go into the next batch of one context.

The order is llama-server's and vLLM's: first one token of every sequence that is decoding, then prompt chunks while
there is room in the batch, so that a long prompt delays the others by one chunk at most. Requests are admitted in
their order of arrival, by the KV cells they need; when cells run out, the youngest request is preempted: it waits again
at its place in the queue, and is restored or recomputed later.
"""

from __future__ import annotations

import bisect
import itertools
from collections import abc

from edge_phi3.engine.batch import BatchWriter, Plan
from edge_phi3.engine.batch_shapes import BatchShapes
from edge_phi3.engine.prefix_store import PrefixStore
from edge_phi3.engine.runtime import Context
from edge_phi3.engine.sequence import RunningRequest
from edge_phi3.engine.sequence_pool import SequencePool


class Scheduler:
    """The waiting and running requests of one context.

    Args:
        context: where batches are decoded.
        parallel: how many sequences are decoded together at most.
        window: how many tokens attention reaches back, the token itself included; None for all.
        window_chunk: tokens of a prompt fed at a time beyond the window.
        store: where finished sequences are kept for later prompts; None for nowhere.
        share: whether a prompt may begin with the cells of a running sequence that begins as it does.
        max_tokens: the longest sequence that this context may hold, or None for what its cells allow.
        shapes: which sizes of a batch are fast; None to take them as they come.
    """

    def __init__(
        self,
        context: Context,
        *,
        parallel: int,
        window: int | None = None,
        window_chunk: int = 1,
        store: PrefixStore | None = None,
        share: bool = False,
        max_tokens: int | None = None,
        shapes: BatchShapes | None = None,
    ) -> None:
        self.window = window
        self.window_chunk = window_chunk
        self.store = store
        self._share = share
        self._shapes = shapes
        self._use(context)
        self.parallel = min(parallel, context.sequences)
        self.max_tokens = max_tokens
        self.waiting: list[RunningRequest] = []
        self.running: list[RunningRequest] = []
        self.preemptions = 0
        self._prompts: list[RunningRequest] = []
        """Whose prompts the last step computed."""

    def _use(self, context: Context) -> None:
        self.context = context
        self.pool = SequencePool(context, window=self.window, store=self.store)
        self.kv = self.pool.kv
        self.writer = BatchWriter(
            context, self.kv, window=self.window, window_chunk=self.window_chunk, shapes=self._shapes
        )

    # -- capacity

    def most_cells(self, request: RunningRequest) -> int:
        """Give the cells that a request occupies at most, should all its sequences run to their full length."""
        return self.cells_for(request, request.max_length, shared=self.kv.shared)

    def cells_for(self, request: RunningRequest, longest: int, *, shared: bool) -> int:
        """Give the cells of a request at a length, with those of its prompt shared by its sequences or not."""
        prompt, rows = request.prompt_length, request.rows
        most = prompt + rows * (longest - prompt) if shared else rows * longest
        if self.window is not None:
            most = min(most, rows * (self.window + self.window_chunk))
        return most

    def fits(self, length: int) -> bool:
        """Say whether one sequence can ever become so long."""
        if self.window is not None:
            length = min(length, self.window + self.window_chunk)
        return length <= self.kv.cells_per_sequence

    def room(self, length: int, rows: int) -> int:
        """Say by how many tokens each of so many sequences may go on that begin with a prompt of `length` tokens."""
        kv = self.kv
        return (kv.cells - length) // rows if kv.shared else kv.cells_per_sequence - length

    @property
    def sequences_running(self) -> int:
        """How many sequences the running requests have, counting those still to be forked."""
        return sum(request.rows for request in self.running)

    # -- entering and leaving

    def enqueue(self, request: RunningRequest) -> None:
        """Put a request into the queue at its place by arrival."""
        bisect.insort(self.waiting, request, key=lambda waiting: waiting.arrival)

    def admit(self) -> None:
        """Move requests from the head of the queue to the running ones, while sequences and cells allow."""
        if not self.waiting:
            return
        self.pool.settle()
        rows = self.sequences_running
        while self.waiting:
            request = self.waiting[0]
            if rows + request.rows > self.parallel or not self._has_cells_for(request, rows):
                return
            self.running.append(self.waiting.pop(0))
            reuse = self._may_share(request)
            self.pool.attach(request.sequences[0], share=reuse, restore=reuse)
            if not request.generated:
                request.cached_tokens = request.sequences[0].computed
            rows += request.rows

    def _may_share(self, request: RunningRequest) -> bool:
        """Say whether a request may begin with what was computed for others, or for itself before it was preempted."""
        return request.generated > 0 or self._share

    def _has_cells_for(self, request: RunningRequest, rows: int) -> bool:
        if not self.running:
            return True
        first = request.sequences[0]
        shared = self.pool.shared_prefix(first)[0] if self._may_share(request) else 0
        promised = sum(sequence.pending for running in self.running for sequence in running.sequences)
        # One cell for each sequence that decodes, so that an arrival does not preempt anybody in the very next step.
        needed = promised + first.length - shared + request.rows + rows
        return needed <= self.kv.free

    def retire(self, request: RunningRequest) -> None:
        """Take a finished or failed request out. Its cells are free after the next `settle`."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pool.finish(request)

    def preempt_youngest(self) -> bool:
        """Send the youngest running request back to the queue. False when it is the only one."""
        if len(self.running) < 2:
            return False
        request = max(self.running, key=lambda running: running.arrival)
        self.retire(request)
        self.pool.settle()
        self.enqueue(request)
        self.preemptions += 1
        return True

    def forget(self) -> None:
        """Empty the KV cache after a failure: every running request goes back to the queue to be recomputed."""
        for request in self.running:
            for sequence in request.sequences:
                sequence.seq_id, sequence.computed = -1, 0
            self.enqueue(request)
        self.running.clear()
        self.pool.forget()

    # -- one step

    def batches(self) -> list[list[RunningRequest]]:
        """Give the running requests of each batch of this step.

        A divided cache takes prompts by themselves: llama.cpp would split them from what decodes anyway, and take one
        token of each prompt along with that, which leaves a number that its kernels do not like. Those whose prompts
        have just been computed wait for the next prompts, which delays them by no more than one chunk, and then decode
        together with these: requests that arrive together stay together.
        """
        decoding = [request for request in self.running if request.decoding]
        prompts = [request for request in self.running if not request.decoding]
        if self.context.unified:
            return [self.running[:]] if prompts else self._parts(decoding)
        just_computed, self._prompts = self._prompts, prompts
        if not prompts:
            return self._parts(decoding)
        wait = all(request in just_computed for request in decoding)
        return [prompts] if wait else [*self._parts(decoding), prompts]

    def _parts(self, decoding: list[RunningRequest]) -> list[list[RunningRequest]]:
        """Give requests that decode all together, or in two halves where that is faster."""
        shapes = self.writer.shapes
        if len(decoding) < 2 or shapes is None:
            return [decoding] if decoding else []
        sizes = shapes.parts(sum(request.rows for request in decoding))
        if len(sizes) == 1:
            return [decoding]
        if not self.context.unified:
            decoding.sort(key=lambda request: request.sequences[0].seq_id)
        rows = list(itertools.accumulate(request.rows for request in decoding))
        half = bisect.bisect_left(rows, sizes[0]) + 1
        return [decoding[:half], decoding[half:]]

    def plan(self, members: list[RunningRequest]) -> Plan:
        """Write a batch of `members` into the context's arrays and take the cells that it needs.

        Those of them that have been preempted since are left out; the plan is empty when none is left.
        """
        while members := [request for request in members if request.sequences[0].seq_id >= 0]:
            plan = self._try_plan(members)
            if plan.count:
                self.writer.fill_up(plan)
                return plan
            if self.pool.unsettled:
                self.pool.settle()
            elif not self.preempt_youngest():
                raise AssertionError("one request alone does not fit the cache that it was admitted to")
        return Plan()

    def _try_plan(self, members: list[RunningRequest]) -> Plan:
        """Plan a batch; an empty one means that none of the members can go on before somebody is preempted."""
        for request in members:
            self._attach_restored(request)
        decoding = [request for request in members if request.decoding]
        if not self.context.unified:
            decoding.sort(key=lambda request: request.sequences[0].seq_id)
        rows = [sequence for request in decoding for sequence in request.sequences]
        if len(rows) > self.kv.free:
            return Plan()
        plan = Plan(choosing=decoding)
        self.writer.add_decodes(plan, rows)
        for request in members:
            if not request.decoding and plan.count < self.context.batch_size:
                self.writer.add_prompt(plan, request)
        return plan

    def _attach_restored(self, request: RunningRequest) -> None:
        """Attach the sequences of a request that comes back, one after the other.

        Each waits until those before it are computed, and so finds the cells that it shares with them. Their last
        tokens
        are left to be decoded together, since the decoder wants all rows at once.
        """
        for sequence in request.sequences:
            if sequence.seq_id < 0:
                self.pool.attach(sequence, share=True, restore=False)
            if sequence.pending > 1:
                return

    def computed(self, plan: Plan) -> None:
        """Note that a plan's batch has been decoded."""
        for sequence, count in plan.chunks:
            sequence.computed += count
            if count > 1:
                self.pool.computed(sequence)

    def extend(self, request: RunningRequest, tokens: abc.Sequence[int], computed: int) -> None:
        """Continue a request's only sequence by several tokens.

        Args:
            request: whose sequence; a plan has taken the cell of the first token that was decoded.
            tokens: what was chosen, but for a last token that is not to be decoded.
            computed: how many tokens were decoded.
        """
        sequence = request.sequences[0]
        if computed > 1:
            self.kv.append(sequence.seq_id, computed - 1)
            sequence.scattered += (computed - 1) * (len(self.running) > 1)
        sequence.computed += computed
        sequence.extend(tokens)
        request.generated += len(tokens)

    def reorder(self, request: RunningRequest, parents: abc.Sequence[int], tokens: abc.Sequence[int]) -> None:
        """Continue a request's sequences with the chosen tokens.

        Args:
            request: whose sequences.
            parents: for each new sequence, which of the present ones it continues.
            tokens: the token that each new sequence appends.
        """
        old = request.sequences
        if [*parents] != [*range(len(old))]:
            kept = set(parents)
            for row, sequence in enumerate(old):
                if row not in kept:
                    self.pool.release(sequence.seq_id)
            continued: set[int] = set()
            request.sequences = []
            for parent in parents:
                request.sequences.append(self.pool.fork(old[parent]) if parent in continued else old[parent])
                continued.add(parent)
        for sequence, token in zip(request.sequences, tokens, strict=True):
            sequence.append(token)
