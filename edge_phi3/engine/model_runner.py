"""Batches of one context: which tokens of which sequences are decoded in one call, and what each of them looks back on.

The order is llama-server's and vLLM's: first one token of every row that decodes, then prompts chunk by chunk while
there is room, so that a long prompt delays the others by one chunk at most. On a CPU, rows and prompts that would fill
a tile together take turns.

llama.cpp does not know Phi-3's sliding window: what has left it is removed before a token is decoded. A token sees the
last `window` ones, itself included. Those of a prompt are fed `window_chunk` at a time beyond the window, and all of a
chunk see what its first one sees. Chunks begin at absolute positions, so that an answer does not depend on how a prompt
was cut into batches.

Requests of different adapters take turns, since a batch is computed with one, and each switch makes llama.cpp reserve
its graphs anew.
"""

from __future__ import annotations

import operator
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.batch_sizes import BatchSizes
from edge_phi3.engine.host_cache import HostCache
from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.sequence import RunningRequest, Sequence
from edge_phi3.llama.context import Context

TURN = 16
"""Batches that an adapter's requests have before those of another one go on."""
_FEW_RUNS = 32
"""Tokens that lie apart on a GPU and are still copied to main memory one by one."""


@dataclass(slots=True)
class Batch:
    """One batch of `count` tokens, already written into the context's arrays; nobody reads the last `padding`.

    `members` are the requests that have tokens in it, `choosing` those whose decoders get logits, in the order of the
    logits' rows; `scored` those of whose prompts some tokens have logits too, each with its first row and how many.
    There are `rows` of logits in all.
    """

    count: int = 0
    padding: int = 0
    rows: int = 0
    choosing: list[RunningRequest] = field(default_factory=list)
    members: list[RunningRequest] = field(default_factory=list)
    scored: list[tuple[RunningRequest, int, int]] = field(default_factory=list)


class ModelRunner:
    """One context, its cells, and the requests that run in it.

    `max_tokens` is the longest sequence that is computed here; None for what the cells allow. `sizes` are the numbers
    of rows that are fast; None to decode all together. `window_chunk` tokens of a prompt are fed at a time beyond the
    window. `turn` is how many batches one adapter has before another. The other options are those of `KVCache`.
    `running` are the requests that hold cells, in the order of their admission.
    """

    def __init__(
        self,
        context: Context,
        *,
        max_tokens: int | None = None,
        window: int | None = None,
        window_chunk: int = 1,
        host_cache: HostCache | None = None,
        retain: bool = False,
        sizes: BatchSizes | None = None,
        turn: int = TURN,
    ) -> None:
        self.context = context
        self.max_tokens = max_tokens
        self.kv = KVCache(context, window=window, host_cache=host_cache, retain=retain)
        self.running: list[RunningRequest] = []
        self._window = window
        self._window_chunk = window_chunk
        self._sizes = sizes
        self._batches = 0
        self._prompts_turn = False
        self._decoded = self._adapter = 0
        self._turn = self._left = turn
        self._ended: dict[int, int] = {}
        """When the last turn of each adapter ended, in batches."""

    def cells_needed(self, prompt_length: int, length: int, rows: int) -> int:
        """Return the most cells that a request holds from its prompt on until its rows have so many tokens.

        Rows share what they have in common, which is the prompt at least.
        """
        window = length if self._window is None else self._window
        gone = max(0, length - window)
        shared, own = max(0, prompt_length - gone), min(length - prompt_length, window)
        return max(min(prompt_length, window + self._window_chunk - 1), shared + rows * max(0, own))

    # -- batches

    def plan(self) -> Batch:
        """Write the next batch of the running requests, and take the cells that it needs.

        An empty batch means that none of them can go on before another one leaves.
        """
        batch = Batch()
        self._take_turns()
        decoding: list[RunningRequest] = []
        prompts: list[RunningRequest] = []
        for request in self.running:
            if request.request.adapter == self._adapter:
                self._part_rows(request)
                (decoding if request.decoding else prompts).append(request)
        # What repeats to the bit does not depend on what was measured when the service started.
        sizes = None if any(request.exact for request in self.running) else self._sizes
        apart = sizes is not None and self._fill(sizes.tile, decoding, prompts)
        self._prompts_turn = apart and not self._prompts_turn
        if self._prompts_turn:
            self._add_prompts(batch, prompts)
            if batch.count:
                return batch
        if prompts and not apart:
            sizes = None
        if sizes is not None:
            decoding = self._in_turn(decoding, sizes)
        if not self._add_rows(batch, decoding):
            return batch
        if sizes is not None:
            self._pad(batch, sizes.padding(batch.count))
        if not apart:
            self._add_prompts(batch, prompts)
        return batch

    def decode(self, batch: Batch, beside: Callable[[], None]) -> NDArray[np.float32]:
        """Decode a batch, and call `beside` meanwhile. Return its logits, as `Context.decode` does."""
        self._left -= 1
        self._decoded += 1
        logits = self.context.decode(batch.count, batch.rows + batch.padding, beside)
        if batch.padding:
            self.context.remove(self.context.scratch, -1, -1)
        return logits[: batch.rows]

    def _take_turns(self) -> None:
        """Choose whose requests go on: one adapter's, until they have ended, or have had their turn and others wait.

        Next is the one whose last turn is the longest ago, so that each waits for one turn of every other at most.
        """
        waiting = {request.request.adapter for request in self.running}
        if self._adapter in waiting and (self._left > 0 or len(waiting) == 1):
            return
        waiting.discard(self._adapter)
        self._ended[self._adapter] = self._decoded
        self._adapter = min(waiting, key=lambda adapter: self._ended.get(adapter, -1))
        self._left = self._turn
        self.context.adapt(self._adapter)

    def _in_turn(self, decoding: list[RunningRequest], sizes: BatchSizes) -> list[RunningRequest]:
        """Return the requests that go on now: all, or those whose last token is the oldest."""
        most = sizes.first(sum(len(request.sequences) for request in decoding))
        chosen: list[RunningRequest] = []
        for request in sorted(decoding, key=lambda request: request.batch):
            if most > 0:
                chosen.append(request)
                most -= len(request.sequences)
        return chosen

    def _pad(self, batch: Batch, wanted: int) -> None:
        """Add tokens that nobody reads, as far as there is room for them."""
        context, start = self.context, batch.count
        batch.padding = min(wanted, self.kv.free, context.batch_size - start)
        part = slice(start, start + batch.padding)
        context.tokens[part] = 0
        context.positions[part] = np.arange(batch.padding, dtype=np.int32)
        context.seq_ids[part] = context.scratch
        # The output layer's batch is that of the rows with logits.
        context.wants_logits[part] = 1
        batch.count += batch.padding

    def _add_rows(self, batch: Batch, decoding: list[RunningRequest]) -> bool:
        """Add the last token of each row of the requests that decode; False when there are too few cells."""
        kv, context = self.kv, self.context
        rows = [sequence for request in decoding for sequence in request.sequences]
        if self._window is not None:
            for request in decoding:
                for sequence in request.sequences:
                    kv.trim(sequence.seq_id, self._first_visible(request, sequence.computed))
        count = len(rows)
        kv.make_room(count)
        if count > kv.free:
            return False
        context.tokens[:count] = [token for request in decoding for token in request.decoder.last_tokens()]
        context.positions[:count] = [sequence.computed for sequence in rows]
        context.seq_ids[:count] = [sequence.seq_id for sequence in rows]
        context.wants_logits[:count] = 1
        self._batches += 1
        for request in decoding:
            request.batch = self._batches
        kv.append_one([sequence.seq_id for sequence in rows])
        scattered = count > 1
        for sequence in rows:
            sequence.computed += 1
            sequence.scattered += scattered
        batch.count = batch.rows = count
        batch.choosing, batch.members = decoding[:], decoding[:]
        return True

    def _fill(self, tile: int, decoding: list[RunningRequest], prompts: list[RunningRequest]) -> bool:
        """Return whether rows that decode, fewer than a tile's, and prompts would fill one together."""
        rows = sum(len(request.sequences) for request in decoding)
        chunks = sum(self._next_chunk(request) * len(request.sequences) for request in prompts)
        return 0 < rows < tile <= rows + chunks

    def _add_prompts(self, batch: Batch, prompts: list[RunningRequest]) -> None:
        for request in prompts:
            if batch.count < self.context.batch_size:
                self._add_prompt(batch, request)

    def _next_chunk(self, request: RunningRequest) -> int:
        """Return how many tokens of a request that is not computed yet may come next, in each of its rows."""
        rows, computed = request.sequences, request.sequences[0].computed
        # Several rows leave their last tokens to be decoded together, since the decoder wants all logits at once.
        whole = request.decoder.rows == 1
        end = request.length if whole else request.stem if len(rows) == 1 else request.length - 1
        return end - computed if self._window is None else min(end - computed, self._chunk(request, computed))

    def _add_prompt(self, batch: Batch, request: RunningRequest) -> None:
        """Add tokens of a request that is not computed yet, as far as there is room for them and cells are free."""
        tokens, rows = request.decoder.row_tokens(), request.sequences
        if self._window is not None:
            for sequence in rows:
                self.kv.trim(sequence.seq_id, self._first_visible(request, sequence.computed))
        # Rows go on side by side: only then do they need no more cells than when they were first computed.
        count = min(self._next_chunk(request), (self.context.batch_size - batch.count) // len(rows))
        first, known = batch.count - rows[0].computed, len(request.prompt_logprobs)
        if request.unscored > (room := self.context.scored - sum(scored for _, _, scored in batch.scored)):
            count = min(count, known + room - rows[0].computed)
        self.kv.make_room(count * len(rows))
        count = min(count, self.kv.free // len(rows))
        if count == 0:
            return
        scored = min(request.unscored, rows[0].computed + count - known)
        for sequence, line in zip(rows, tokens, strict=False):
            self._write(batch, sequence, line[sequence.computed : sequence.computed + count])
            if count > 1 and not request.exact:
                self.kv.computed(sequence, request.marked(line[: sequence.computed]))
        batch.members.append(request)
        if scored > 0:
            self.context.wants_logits[first + known : first + known + scored] = 1
            batch.scored.append((request, batch.rows, scored))
            batch.rows += scored
        if len(tokens) == 1 and rows[0].computed == request.length:
            self.context.wants_logits[batch.count - 1] = 1
            batch.choosing.append(request)
            batch.rows += 1

    def _part_rows(self, request: RunningRequest) -> None:
        """Fork a sequence for each row of a request that comes back, once what the rows share is computed."""
        stem, missing = request.sequences[0], request.decoder.rows - len(request.sequences)
        if missing > 0 and stem.computed >= request.stem:
            request.sequences += [self.kv.fork(stem) for _ in range(missing)]

    def _write(self, batch: Batch, sequence: Sequence, tokens: NDArray[np.int32]) -> None:
        context, count = self.context, len(tokens)
        part = slice(batch.count, batch.count + count)
        context.tokens[part] = tokens
        context.positions[part] = np.arange(sequence.computed, sequence.computed + count, dtype=np.int32)
        context.seq_ids[part] = sequence.seq_id
        context.wants_logits[part] = 0
        self.kv.append(sequence.seq_id, count)
        sequence.computed += count
        batch.count += count

    # -- what becomes of sequences

    def reorder(self, request: RunningRequest, parents: abc.Sequence[int]) -> None:
        """Continue a request's sequences: new row i goes on with what row ``parents[i]`` holds."""
        old = request.sequences
        if len(parents) == len(old) and all(map(operator.eq, parents, range(len(old)))):
            return
        for row in set(range(len(old))).difference(parents):
            self.kv.release(old[row].seq_id)
        continued: set[int] = set()
        request.sequences = []
        for parent in parents:
            request.sequences.append(self.kv.fork(old[parent]) if parent in continued else old[parent])
            continued.add(parent)

    def leave(self, request: RunningRequest) -> None:
        """Take out a request that has ended, or waits again."""
        self.running.remove(request)
        lines = request.decoder.history.tokens
        # What has failed may have failed between its history and its sequences.
        kept = 0 if request.exact or request.failed else len(request.sequences)
        beams = request.request.config.is_beam_search
        for row, sequence in enumerate(request.sequences):
            # Beams have changed places since their sequences were computed: the prompt of one is all that is certain.
            if row >= (min(kept, 1) if beams else kept):
                self.kv.finish(sequence, None)
                continue
            prompt = min(sequence.computed, request.prompt_length)
            certain = prompt if beams else sequence.computed
            # A GPU copies each run of neighbouring cells by itself, layer by layer, and tokens that were decoded beside
            # others lie apart.
            costly = self.context.offloaded and sequence.scattered > _FEW_RUNS
            self.kv.finish(sequence, request.marked(lines[row, :certain]), prompt if costly else certain)
        request.sequences = []

    # -- the window

    def _chunk(self, request: RunningRequest, position: int) -> int:
        """Return how many tokens from `position` on may be in one batch."""
        assert self._window is not None
        if position < self._window:
            return self._window - position
        if position >= request.prompt_length:
            return 1
        left = self._window_chunk - (position - self._window) % self._window_chunk
        return min(left, request.prompt_length - position)

    def _first_visible(self, request: RunningRequest, position: int) -> int:
        """Return the first position that the token at `position` sees."""
        assert self._window is not None
        if self._window <= position < request.prompt_length:
            position -= (position - self._window) % self._window_chunk
        return max(0, position - self._window + 1)
