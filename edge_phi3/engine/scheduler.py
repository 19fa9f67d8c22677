"""Which tokens go into the next batch of one context.

The order is llama-server's and vLLM's: first one token of every sequence that is decoding, then prompt chunks while
there is room in the batch, so that a long prompt delays the others by one chunk at most. Requests are admitted in
their order of arrival, by the KV cells they need; when cells run out, cached sequences leave, and after them the
youngest request is preempted: it waits again at its place in the queue, and is recomputed later.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np

from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.prefix_cache import PrefixCache
from edge_phi3.engine.runtime import Context
from edge_phi3.engine.sequence import RunningRequest, Sequence


@dataclass(slots=True)
class Plan:
    """One batch, already written into the context's arrays.

    Attributes:
        count: tokens in the batch.
        choosing: the requests whose decoders get logits, in the order of the logits' rows.
        chunks: every sequence in the batch, with how many of its tokens are in it.
    """

    count: int = 0
    choosing: list[RunningRequest] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)


class Scheduler:
    """The waiting and running requests of one context.

    Args:
        context: where batches are decoded.
        parallel: how many sequences are decoded together at most.
        window: how many tokens attention reaches back, the token itself included; None for all.
        window_chunk: tokens of a prompt fed at a time beyond the window.
        prefix_cache: whether finished sequences stay as cache.
        max_tokens: the longest sequence that this context may hold, or None for what its cells allow.
    """

    def __init__(
        self,
        context: Context,
        *,
        parallel: int,
        window: int | None = None,
        window_chunk: int = 1,
        prefix_cache: bool = True,
        max_tokens: int | None = None,
    ) -> None:
        self.context = context
        self.kv = KVCache(
            context,
            cells=context.cells,
            sequences=context.sequences,
            cells_per_sequence=context.cells_per_sequence,
            shared=context.unified,
        )
        self.prefix = PrefixCache()
        self.parallel = min(parallel, context.sequences)
        self.window = window
        self.window_chunk = window_chunk
        self.max_tokens = max_tokens
        self.waiting: list[RunningRequest] = []
        self.running: list[RunningRequest] = []
        self.preemptions = 0
        self._caching = prefix_cache

    # -- capacity

    def most_cells(self, request: RunningRequest) -> int:
        """Give the cells that a request occupies at most, should all its sequences run to their full length."""
        prompt, longest = request.prompt_length, request.max_length
        rows = request.rows
        most = prompt + rows * (longest - prompt) if self.kv.shared else rows * longest
        if self.window is not None:
            most = min(most, rows * (self.window + self.window_chunk))
        return most

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
        rows = self.sequences_running
        while self.waiting:
            request = self.waiting[0]
            if rows + request.rows > self.parallel or not self._has_cells_for(request, rows):
                return
            self.running.append(self.waiting.pop(0))
            self._attach(request.sequences[0], reuse=request.reuses_cache)
            if not request.generated:
                request.cached_tokens = request.sequences[0].computed
            rows += request.rows

    def _has_cells_for(self, request: RunningRequest, rows: int) -> bool:
        if not self.running:
            return True
        first = request.sequences[0]
        matched = self._match(first)[0] if request.reuses_cache else 0
        promised = sum(sequence.pending for running in self.running for sequence in running.sequences)
        # One cell for each sequence that decodes, so that an arrival does not preempt anybody in the very next step.
        needed = promised + first.length - matched + request.rows + rows
        return needed <= self.kv.free or needed <= self.kv.free + self.kv.exclusive(self.prefix.evictable)

    def retire(self, request: RunningRequest) -> None:
        """Take a finished or failed request out; its sequences stay as cache while there is room."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.detach(request)

    def detach(self, request: RunningRequest) -> None:
        """Take the KV cells from a request's sequences, keeping their content as cache."""
        for sequence in request.sequences:
            self._to_cache(sequence)

    def preempt_youngest(self) -> bool:
        """Send the youngest running request back to the queue. False when it is the only one.

        One that decodes alone is spared while there are others: computed anew, its numbers might differ.
        """
        if len(self.running) < 2:
            return False
        request = max(self.running, key=lambda running: (not running.alone, running.arrival))
        self.running.remove(request)
        self.detach(request)
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
        self.prefix.clear()
        self.kv.clear()

    # -- one step

    def batches(self) -> list[list[RunningRequest]]:
        """Give the running requests that share a batch in this step: one batch, and one for each that decodes alone."""
        self.admit()
        alone = [[request] for request in self.running if request.alone]
        together = [request for request in self.running if not request.alone] if alone else list(self.running)
        return [together, *alone] if together else alone

    def plan(self, members: list[RunningRequest]) -> Plan:
        """Write a batch of `members` into the context's arrays and take the cells that it needs.

        Those of them that have been preempted since are left out; the plan may be empty for that reason only.
        """
        while members := [request for request in members if request.sequences[0].seq_id >= 0]:
            plan = self._try_plan(members)
            if plan.count:
                return plan
            if not self.preempt_youngest():
                raise AssertionError("one request alone does not fit the cache that it was admitted to")
        return Plan()

    def _try_plan(self, members: list[RunningRequest]) -> Plan:
        """Plan a batch; an empty one means that none of the members can go on before somebody is preempted."""
        for request in members:
            self._attach_restored(request)
        decoding = [request for request in members if request.decoding]
        rows = [sequence for request in decoding for sequence in request.sequences]
        if not self._make_room(len(rows)):
            return Plan()
        plan = Plan(choosing=decoding)
        self._add_decodes(plan, rows)
        for request in members:
            if not request.decoding and plan.count < self.context.batch_size:
                self._add_prompt(plan, request)
        return plan

    def _add_decodes(self, plan: Plan, rows: list[Sequence]) -> None:
        count = len(rows)
        if count == 0:
            return
        context = self.context
        context.tokens[:count] = [int(sequence.tokens[sequence.computed]) for sequence in rows]
        context.positions[:count] = [sequence.computed for sequence in rows]
        context.seq_ids[:count] = [sequence.seq_id for sequence in rows]
        context.wants_logits[:count] = 1
        for sequence in rows:
            if self.window is not None and sequence.computed >= self.window:
                self.kv.trim(sequence.seq_id, sequence.computed - self.window + 1)
            self.kv.append(sequence.seq_id, 1)
            plan.chunks.append((sequence, 1))
        plan.count = count

    def _attach_restored(self, request: RunningRequest) -> None:
        """Attach the sequences of a request that comes back, one after the other.

        Each waits until those before it are computed, and so finds the cells that it shares with them. Their last
        tokens
        are left to be decoded together, since the decoder wants all rows at once.
        """
        for sequence in request.sequences:
            if sequence.seq_id < 0:
                self._attach(sequence)
            if sequence.pending > 1:
                return

    def _add_prompt(self, plan: Plan, request: RunningRequest) -> None:
        alone = len(request.sequences) == 1
        sequence = next(sequence for sequence in request.sequences if alone or sequence.pending > 1)
        wanted = sequence.pending if alone else sequence.pending - 1
        count = self._chunk(sequence, min(wanted, self.context.batch_size - plan.count))
        if count == 0:
            return
        last = alone and count == wanted
        self._write_chunk(plan, sequence, count, last=last)
        if last:
            plan.choosing.append(request)

    def _chunk(self, sequence: Sequence, most: int) -> int:
        """Say how many tokens of a prompt fit this batch, the window's rule and the free cells."""
        if self.window is not None:
            inside = self.window - sequence.computed
            if inside > 0:
                most = min(most, inside)
            else:
                most = min(most, self.window_chunk)
                self.kv.trim(sequence.seq_id, sequence.computed - self.window + 1)
        self._make_room(most)
        return min(most, self.kv.free)

    def _write_chunk(self, plan: Plan, sequence: Sequence, count: int, *, last: bool) -> None:
        context, start = self.context, plan.count
        part = slice(start, start + count)
        context.tokens[part] = sequence.tokens[sequence.computed : sequence.computed + count]
        context.positions[part] = np.arange(sequence.computed, sequence.computed + count, dtype=np.int32)
        context.seq_ids[part] = sequence.seq_id
        context.wants_logits[part] = 0
        context.wants_logits[start + count - 1] = last
        self.kv.append(sequence.seq_id, count)
        plan.chunks.append((sequence, count))
        plan.count += count

    def computed(self, plan: Plan) -> None:
        """Note that a plan's batch has been decoded."""
        for sequence, count in plan.chunks:
            sequence.computed += count
            if count > 1 and self._caching:
                self.prefix.insert(sequence.seq_id, sequence.tokens[: sequence.computed], evictable=False)

    def reorder(self, request: RunningRequest, parents: list[int], tokens: list[int]) -> None:
        """Continue a request's sequences with the chosen tokens.

        Args:
            request: whose sequences.
            parents: for each new sequence, which of the present ones it continues.
            tokens: the token that each new sequence appends.
        """
        old = request.sequences
        if len(parents) != len(old) or any(parent != row for row, parent in enumerate(parents)):
            kept = set(parents)
            for row, sequence in enumerate(old):
                if row not in kept:
                    self._to_cache(sequence)
            continued: set[int] = set()
            request.sequences = []
            for parent in parents:
                request.sequences.append(self._fork(old[parent]) if parent in continued else old[parent])
                continued.add(parent)
        for sequence, token in zip(request.sequences, tokens, strict=True):
            sequence.append(token)

    # -- sequences and cells

    def _fork(self, sequence: Sequence) -> Sequence:
        self._make_room(0 if self.kv.shared else sequence.computed, sequences=1)
        return sequence.fork(self.kv.fork(sequence.seq_id, sequence.computed))

    def _attach(self, sequence: Sequence, *, reuse: bool = True) -> None:
        """Give a sequence an id, beginning with the longest prefix that some sequence has computed, if it may."""
        self._make_room(0, sequences=1)
        matched, owner = self._match(sequence) if reuse else (0, None)
        if owner is None:
            sequence.seq_id, sequence.computed = self.kv.acquire(), 0
            return
        self.prefix.touch(owner)
        sequence.seq_id, sequence.computed = self.kv.fork(owner, matched), matched

    def _match(self, sequence: Sequence) -> tuple[int, int | None]:
        if not self._caching:
            return 0, None
        # The last token is always decoded: its logits choose the next one.
        matched, owners = self.prefix.match(sequence.tokens[: sequence.length - 1])
        reach = matched if self.window is None else max(0, matched - self.window + 1)
        for owner in owners:
            start = int(self.kv.start[owner])
            if start == 0 or (self.window is not None and start <= reach):
                return matched, owner
        return 0, None

    def _to_cache(self, sequence: Sequence) -> None:
        """Take a sequence's id away, and keep what it computed as cache when that is worth a thing."""
        seq_id, tokens = sequence.seq_id, sequence.tokens[: sequence.computed]
        sequence.seq_id, sequence.computed = -1, 0
        if seq_id < 0:
            return
        self.prefix.remove(seq_id)
        matched, _ = self.prefix.match(tokens)
        if not self._caching or matched == len(tokens):
            self.kv.release(seq_id)
            return
        for shorter in self.prefix.covered_by(tokens):
            self._evict(shorter)
        self.prefix.insert(seq_id, tokens, evictable=True)

    def _make_room(self, cells: int, *, sequences: int = 0) -> bool:
        """Evict cached sequences until so many cells and sequence ids are free. False when that is not enough."""
        while self.kv.free < cells or self.kv.free_sequences < sequences:
            evictable = self.prefix.evictable
            if not evictable:
                return False
            self._evict(evictable[0])
        return True

    def _evict(self, seq_id: int) -> None:
        self.prefix.remove(seq_id)
        self.kv.release(seq_id)
