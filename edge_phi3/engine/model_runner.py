"""Batches of one context: which tokens of which sequences are decoded in one call, and what each of them looks back on.

The order is llama-server's and vLLM's: first one token of every row that decodes, then prompts chunk by chunk while
there is room, so that a long prompt delays the others by one chunk at most. On a CPU, rows and prompts that would fill
a tile together take turns.

Requests of different adapters take turns, since a batch is computed with one, and each switch makes llama.cpp reserve
its graphs anew.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.batch_sizes import BatchSizes
from edge_phi3.engine.host_cache import HostCache
from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.sequence import RunningRequest
from edge_phi3.engine.speculation import Speculation
from edge_phi3.engine.window import SlidingWindow
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
    There are `rows` of logits in all, and `drafted` more for `drafts`: tokens of shape ``(rows of the request,
    tokens)``, whose logits come last, request by request, and of each the first tokens of all its rows first.
    """

    count: int = 0
    padding: int = 0
    rows: int = 0
    drafted: int = 0
    choosing: list[RunningRequest] = field(default_factory=list)
    members: list[RunningRequest] = field(default_factory=list)
    scored: list[tuple[RunningRequest, int, int]] = field(default_factory=list)
    drafts: dict[RunningRequest, NDArray[np.int32]] = field(default_factory=dict)


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
        speculation: Speculation | None = None,
        turn: int = TURN,
    ) -> None:
        self.context = context
        self.max_tokens = max_tokens
        self.kv = KVCache(context, window=window, host_cache=host_cache, retain=retain)
        self.running: list[RunningRequest] = []
        self.window = SlidingWindow(window, window_chunk)
        self._sizes = sizes
        self._speculation = speculation or Speculation(0)
        self._batches = 0
        self._prompts_turn = False
        self._decoded = self._adapter = 0
        self._turn = self._left = turn
        self._ended: dict[int, int] = {}
        """When the last turn of each adapter ended, in batches."""

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
                if len(request.sequences) < request.decoder.rows:
                    self._part_rows(request)
                (decoding if request.decoding else prompts).append(request)
        # What repeats to the bit does not depend on what was measured when the service started.
        sizes = None if any(request.exact for request in self.running) else self._sizes
        apart = sizes is not None and self._fill(sizes.tile, decoding, prompts)
        self._prompts_turn = apart and not self._prompts_turn
        if self._prompts_turn:
            for request in prompts:
                self._add_prompt(batch, request)
            if batch.count:
                return batch
        drafts = {} if prompts else self._drafts(decoding)
        if drafts or (prompts and not apart):
            sizes = None
        if sizes is not None:
            decoding = self._in_turn(decoding, sizes)
        if not self._add_rows(batch, decoding):
            return batch
        if sizes is not None:
            self._pad(batch, sizes.padding(batch.count))
        for request in () if apart else prompts:
            self._add_prompt(batch, request)
        for request, draft in drafts.items():
            self._add_draft(batch, request, draft)
        return batch

    def decode(self, batch: Batch, beside: Callable[[], None]) -> NDArray[np.float32]:
        """Decode a batch, and call `beside` meanwhile. Return its logits, as `Context.decode` does."""
        self._left, self._decoded = self._left - 1, self._decoded + 1
        started = time.perf_counter()
        logits = self.context.decode(batch.count, batch.rows + batch.padding + batch.drafted, beside)
        if batch.count == batch.rows + batch.padding + batch.drafted:  # prompts cost no output layer
            self._speculation.took(batch.count, time.perf_counter() - started)
        if batch.padding:
            self.context.remove(self.context.scratch, -1, -1)
        return logits[: batch.rows + batch.drafted]

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
        for request in decoding:
            self._trim(request)
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

    def _next_chunk(self, request: RunningRequest) -> int:
        """Return how many tokens of a request that is not computed yet may come next, in each of its rows."""
        rows, computed = request.sequences, request.sequences[0].computed
        # Several rows leave their last tokens to be decoded together, since the decoder wants all logits at once.
        whole = request.decoder.rows == 1
        end = request.length if whole else request.stem if len(rows) == 1 else request.length - 1
        return self.window.next_chunk(request.prompt_length, computed, end)

    def _trim(self, request: RunningRequest) -> None:
        """Drop what the next token of each row of a request does not see."""
        if self.window.size is not None and request.length > self.window.size:
            for sequence in request.sequences:
                start = self.window.first_visible(request.prompt_length, sequence.computed)
                self.kv.trim(sequence.seq_id, start)

    def _add_prompt(self, batch: Batch, request: RunningRequest) -> None:
        """Add tokens of a request that is not computed yet, as far as there is room for them and cells are free."""
        if batch.count == self.context.batch_size:
            return
        tokens, rows = request.decoder.row_tokens(), request.sequences
        self._trim(request)
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
        context = self.context
        for sequence, line in zip(rows, tokens, strict=False):
            part, end = slice(batch.count, batch.count + count), sequence.computed + count
            context.tokens[part] = line[sequence.computed : end]
            context.positions[part] = np.arange(sequence.computed, end, dtype=np.int32)
            context.seq_ids[part] = sequence.seq_id
            context.wants_logits[part] = 0
            self.kv.append(sequence.seq_id, count)
            sequence.computed = end
            batch.count += count
            if count > 1 and not request.exact:
                self.kv.computed(sequence, request.marked(line[:end]))
        batch.members.append(request)
        if scored > 0:
            context.wants_logits[first + known : first + known + scored] = 1
            batch.scored.append((request, batch.rows, scored))
            batch.rows += scored
        if len(tokens) == 1 and rows[0].computed == request.length:
            context.wants_logits[batch.count - 1] = 1
            batch.choosing.append(request)
            batch.rows += 1

    # -- drafts

    def _drafts(self, decoding: list[RunningRequest]) -> dict[RunningRequest, NDArray[np.int32]]:
        """Return the drafts that are checked beside the rows that decode, in cells that nobody else needs."""
        rows = sum(len(request.sequences) for request in decoding)
        room = min(self.context.batch_size - rows, self.kv.free - rows, self.context.scored)
        if room <= 0 or not self._speculation.may_draft(decoding, rows, room):
            return {}
        may = [(request, most) for request in decoding if (most := self._most_drafted(request)) > 0]
        return self._speculation.drafts(may, rows, room)

    def _most_drafted(self, request: RunningRequest) -> int:
        """Return how many tokens may be drafted for each row of a request."""
        if request.exact or request.request.config.is_beam_search or request.length == request.prompt_length:
            return 0  # the first token parts a prompt's one row into several
        # The last token is not decoded, and what a token sees must not have left the window of the one before it.
        bounds = [request.max_length - 1, self.max_tokens, self.window.size]
        return min(bound for bound in bounds if bound is not None) - request.length

    def _add_draft(self, batch: Batch, request: RunningRequest, draft: NDArray[np.int32]) -> None:
        """Add the tokens of a draft. They count as computed when the model has chosen them: see `accept`."""
        context, rows, end = self.context, request.sequences, batch.count + draft.size
        part = slice(batch.count, end)
        context.tokens[part] = draft.T.ravel()
        context.positions[part] = np.repeat(rows[0].computed + np.arange(draft.shape[1], dtype=np.int32), len(rows))
        context.seq_ids[part] = [sequence.seq_id for sequence in rows] * draft.shape[1]
        context.wants_logits[part] = 1
        for sequence in rows:
            self.kv.append(sequence.seq_id, draft.shape[1])
        batch.count = end
        batch.drafted += draft.size
        batch.drafts[request] = draft

    def accept(self, request: RunningRequest) -> None:
        """Count a drafted token of each row of a request as computed."""
        for sequence in request.sequences:
            sequence.computed += 1
            sequence.scattered += 1

    def judge(self, request: RunningRequest, draft: NDArray[np.int32], held: int) -> None:
        """Drop what was drafted for the rows of a request beyond `held` tokens."""
        self._speculation.judge(request.drafting, draft.shape[1], held, len(draft))
        for sequence in request.sequences:
            self.kv.truncate(sequence.seq_id, sequence.computed)

    def _part_rows(self, request: RunningRequest) -> None:
        """Fork a sequence for each row of a request that comes back, once what the rows share is computed."""
        stem = request.sequences[0]
        if stem.computed >= request.stem:
            request.sequences += [self.kv.fork(stem) for _ in range(len(request.sequences), request.decoder.rows)]

    # -- what becomes of sequences

    def reorder(self, request: RunningRequest, parents: Sequence[int]) -> None:
        """Continue a request's sequences: new row i goes on with what row ``parents[i]`` holds."""
        old = request.sequences
        if parents == range(len(old)):
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
