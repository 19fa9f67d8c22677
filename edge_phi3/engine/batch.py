"""Batches: which tokens of which sequences are decoded in one call, and where they lie in the context's arrays."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.batch_shapes import BatchShapes
from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.runtime import Context
from edge_phi3.engine.sequence import RunningRequest, Sequence


@dataclass(slots=True)
class Plan:
    """One batch, already written into the context's arrays.

    Attributes:
        count: tokens in the batch.
        outputs: how many of them have logits that are wanted.
        padding: how many of them, at its end, only fill it up.
        padded: the sequence that these are put into, and their first position.
        places: where in the batch the rows of the sequences that decode are.
        fillers: free sequences of a divided cache that are computed along, so that the others' ids follow each other.
        choosing: the requests whose decoders get logits, in the order of the logits' rows.
        chunks: every sequence in the batch, with how many of its tokens are in it.
        order: where the first rows of `choosing` lie among the logits; None where they lie in order.
    """

    count: int = 0
    outputs: int = 0
    padding: int = 0
    padded: tuple[int, int] = (-1, 0)
    places: abc.Sequence[int] = ()
    fillers: list[int] = field(default_factory=list)
    choosing: list[RunningRequest] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    order: list[int] | None = None


class BatchWriter:
    """Writes batches into a context's arrays, and has them decoded.

    Args:
        context: where they are decoded.
        kv: the books of its cells.
        window: how many tokens attention reaches back, the token itself included; None for all.
        window_chunk: tokens of a prompt fed at a time beyond the window.
        shapes: which sizes of a batch are fast; None to take them as they come.
    """

    def __init__(
        self, context: Context, kv: KVCache, *, window: int | None, window_chunk: int, shapes: BatchShapes | None
    ) -> None:
        self._context = context
        self._kv = kv
        self._window = window
        self._window_chunk = window_chunk
        self.shapes = shapes

    def add_decodes(self, plan: Plan, rows: list[Sequence]) -> None:
        """Add one token of each of these sequences, and take a cell for it. There must be as many free."""
        count = len(rows)
        if count == 0:
            return
        context, kv = self._context, self._kv
        if not context.unified:
            # llama.cpp computes sequences with caches of their own together only where their ids follow each other.
            order = sorted(range(count), key=lambda row: rows[row].seq_id)
            if order != [*range(count)]:
                rows = [rows[row] for row in order]
                plan.order = [order.index(row) for row in range(count)]
            plan.fillers = self._fillers([sequence.seq_id for sequence in rows])
        plan.count = count + len(plan.fillers)
        plan.outputs = count
        plan.places = range(count)
        if plan.fillers:
            self._write_fillers(plan, rows)
        places = list(plan.places)
        context.tokens[places] = [sequence.last for sequence in rows]
        context.positions[places] = [sequence.computed for sequence in rows]
        context.seq_ids[places] = [sequence.seq_id for sequence in rows]
        context.wants_logits[places] = 1
        for sequence in rows:
            self.trim(sequence, sequence.computed)
            kv.append(sequence.seq_id, 1)
            sequence.scattered += count > 1
            plan.chunks.append((sequence, 1))

    def add_prompt(self, plan: Plan, request: RunningRequest) -> None:
        """Add a chunk of a request's prompt, as far as there is room for it and cells are free."""
        alone = len(request.sequences) == 1
        room = self._context.batch_size - plan.count
        sequence = next(sequence for sequence in request.sequences if alone or sequence.pending > 1)
        wanted = sequence.pending if alone else sequence.pending - 1
        if room < wanted <= self._context.batch_size and not self._context.unified:
            return  # A divided cache computes prompts of one length together: the next step takes it whole.
        count = self._chunk(sequence, min(wanted, room))
        if count == 0:
            return
        last = alone and count == wanted
        self._write_chunk(plan, sequence, count, last=last)
        if last:
            plan.choosing.append(request)

    def fill_up(self, plan: Plan) -> None:
        """Add tokens that nobody reads where that makes the batch faster.

        They are the context's scratch sequence, or go on with a prompt that is alone in its batch where each sequence
        has cells of its own.
        """
        context, start = self._context, plan.count
        if self.shapes is None or not (wanted := self.shapes.padding(start)):
            return
        first, room = 0, context.batch_size - start
        seq_id = context.scratch
        if not context.unified:
            if plan.places or len(plan.chunks) > 1:
                return
            seq_id = plan.chunks[0][0].seq_id
            first = self._kv.length[seq_id]
            room = min(room, self._kv.cells_per_sequence - first)
        count = plan.padding = min(wanted, self._kv.free, room)
        if count == 0:
            return
        plan.padded = (seq_id, first)
        part = slice(start, start + count)
        context.tokens[part] = context.tokens[0]
        context.positions[part] = np.arange(first, first + count, dtype=np.int32)
        context.seq_ids[part] = seq_id
        context.wants_logits[part] = 0
        # The output layer's batch is that of the rows with logits: it has a size of its own.
        context.wants_logits[start : start + min(count, self.shapes.padding(plan.outputs))] = 1
        plan.count += count

    def decode(self, plan: Plan) -> NDArray[np.float32]:
        """Decode a plan's batch, and drop the tokens that only filled it up.

        Returns:
            The logits for `choosing`, as `Context.decode` gives them.

        Raises:
            DecodeFailedError: llama.cpp failed.
        """
        logits = self._context.decode(plan.count, plan.outputs)
        if plan.order is not None:
            logits[: len(plan.order)] = logits[plan.order]
        if plan.padding:
            seq_id, first = plan.padded
            self._context.remove(seq_id, first, -1)
        for seq_id in plan.fillers:
            self._context.remove(seq_id, -1, -1)
        return logits

    def trim(self, sequence: Sequence, position: int) -> None:
        """Free the cells of a sequence that have left the window when `position` is decoded."""
        if self._window is not None:
            self._kv.trim(sequence.seq_id, position - self._window + 1)

    def _fillers(self, ids: list[int]) -> list[int]:
        """Choose free sequences that make a batch faster which sequences with these ids, in order, decode."""
        return [] if self.shapes is None else self.shapes.fillers(ids, self._kv.free_ids)

    def _write_fillers(self, plan: Plan, rows: list[Sequence]) -> None:
        """Write a token that nobody reads for each filler, and find the places of the rows between them."""
        context = self._context
        ids = sorted([*plan.fillers, *(sequence.seq_id for sequence in rows)])
        at = {seq_id: place for place, seq_id in enumerate(ids)}
        plan.places = [at[sequence.seq_id] for sequence in rows]
        places = [at[seq_id] for seq_id in plan.fillers]
        context.tokens[places] = rows[0].last
        context.positions[places] = 0
        context.seq_ids[places] = plan.fillers
        context.wants_logits[places] = 0

    def _chunk(self, sequence: Sequence, most: int) -> int:
        """Say how many tokens of a prompt fit this batch, the window's rule and the free cells."""
        if self._window is not None:
            inside = self._window - sequence.computed
            if inside > 0:
                most = min(most, inside)
            else:
                most = min(most, self._window_chunk)
                self.trim(sequence, sequence.computed)
        return min(most, self._kv.free)

    def _write_chunk(self, plan: Plan, sequence: Sequence, count: int, *, last: bool) -> None:
        context, start = self._context, plan.count
        part = slice(start, start + count)
        context.tokens[part] = sequence.tokens[sequence.computed : sequence.computed + count]
        context.positions[part] = np.arange(sequence.computed, sequence.computed + count, dtype=np.int32)
        context.seq_ids[part] = sequence.seq_id
        context.wants_logits[part] = 0
        context.wants_logits[start + count - 1] = last
        self._kv.append(sequence.seq_id, count)
        plan.chunks.append((sequence, count))
        plan.count += count
        plan.outputs += last
