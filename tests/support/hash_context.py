"""A context that computes nothing: llama.cpp's KV cache as the engine sees it, with hashes for keys and values.

Like llama.cpp it keeps data apart from metadata. A cell says which position of which sequences it holds; its content
stays where it is when the cell is freed, until another token takes its place. What the engine must never do, and what
llama.cpp would refuse or answer with nonsense, is an AssertionError, and noted in `HashContext.violations`.
"""

from collections.abc import Callable
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from edge_phi3.llama import DecodeFailedError
from tests.support.reference import MASK, content, kind, logits_of, term
from tests.support.scenarios import VOCABULARY, Failure, Scenario

TOKEN_BYTES = 16
"""Bytes that a saved token takes: its position and its content."""


class HashContext:
    """What the engine calls of a `Context`; `number` is also that of the set of rotary factors.

    Attributes:
        decodes, padded, refused: calls of `decode`, with tokens that only fill a batch up, without free cells.
        broken: whether every later call of `decode` fails.
        failed: the tokens of the batches that failed, as triples of sequence, position and token.
        trims: removals of a sequence's first positions only.
        switches: how often it was given another adapter.
    """

    def __init__(self, scenario: Scenario, number: int = 0) -> None:
        cells, batch_size = scenario.cells[number], scenario.batch_size
        self.cells, self.batch_size, self.vocab_size = cells, batch_size, VOCABULARY
        self.sequences = self.scratch = scenario.parallel + scenario.kept_sequences
        self.offloaded, self.saves = scenario.offloaded, True
        self.tokens, self.positions, self.seq_ids = (np.zeros(batch_size, np.int32) for _ in range(3))
        self.wants_logits = np.zeros(batch_size, np.int8)
        self.scored = scenario.scored
        # llama.cpp has room for the rows that choose, of whose batches some are filled up to a faster size, and for
        # those of prompts that are scored.
        self._most_rows = max(scenario.parallel + self.scored, len(scenario.sizes))
        self._rotary = number
        self._adapter = 0
        self._window, self._window_chunk = scenario.window, scenario.window_chunk
        self._failures = {failure.decode: failure for failure in scenario.failures if failure.context == number}
        self._owners = np.zeros(cells, np.int64)
        """For each cell, bit s says that sequence s holds it."""
        self._at = np.zeros(cells, np.int64)
        """For each cell, the position that it holds, if any sequence holds it."""
        self._data = np.zeros(cells, np.uint64)
        self._spoilt = np.zeros(cells, bool)
        """Free cells in which a failure may have left what is no number, which gets into every row, though masked."""
        self._anything_spoilt = False
        self._head = 0
        self._logits = np.full((batch_size, self.vocab_size), np.nan, np.float32)
        self.broken = False
        self.violations: list[str] = []
        self.failed: list[list[tuple[int, int, int]]] = []
        self.decodes = self.decoded = self.padded = self.refused = self.trims = self.restored = self.clears = 0
        self.switches = 0

    @property
    def used(self) -> int:
        return int(np.count_nonzero(self._owners))

    @property
    def held(self) -> int:
        """How many positions the sequences hold, summed over the sequences."""
        return int(np.bitwise_count(self._owners).sum())

    def adapt(self, number: int) -> None:
        """Compute with an adapter from now on, or with none."""
        self._check(number != self._adapter, f"the context has adapter {number} already")
        self._adapter = number
        self.switches += 1

    def decode(self, count: int, rows: int, beside: Callable[[], None] = lambda: None) -> NDArray[np.float32]:
        """Decode the first `count` tokens of the arrays; return the logits that were asked for."""
        if not self.offloaded:
            beside()
        self._check(0 < count <= self.batch_size, f"a batch of {count} tokens, of {self.batch_size} at most")
        tokens, positions = self.tokens[:count].tolist(), self.positions[:count].tolist()
        seq_ids, wants = self.seq_ids[:count].tolist(), self.wants_logits[:count].nonzero()[0].tolist()
        self._check(len(wants) == rows, f"{rows} rows of logits are expected, {len(wants)} are asked for")
        self._check(rows <= self._most_rows, f"{rows} rows of logits, of {self._most_rows} at most")
        self._check(min(tokens) >= 0 and max(tokens) < self.vocab_size, f"a token beyond the vocabulary: {tokens}")
        self._check(min(seq_ids) >= 0 and max(seq_ids) <= self.scratch, f"a sequence that is none: {seq_ids}")
        failure = self._failure()
        self.decodes += 1
        self.padded += self.scratch in seq_ids
        attended = self._attended(seq_ids, positions)
        slots = None if failure is not None and failure.status == 1 else self._free_slots(count)
        if slots is None:
            self.refused += failure is None
            self._fail(1, list(zip(seq_ids, positions, tokens, strict=True)))
        done = count if failure is None else min(failure.done, count - 1)
        contents: list[int] = []
        for token, position, seq_id in zip(tokens[:done], positions, seq_ids, strict=False):
            made = content(token, position, attended[seq_id], kind(self._rotary, self._adapter))
            attended[seq_id] = (attended[seq_id] + term(made, position)) & MASK
            contents.append(made)
        kept = slots[:done]
        self._data[kept], self._at[kept] = np.array(contents, np.uint64), positions[:done]
        self._owners[kept] = np.left_shift(1, self.seq_ids[:done].astype(np.int64))
        self._head = (int(slots[-1]) + 1) % self.cells
        if self._anything_spoilt:
            self._spoilt[kept] = False
        if failure is not None:
            self._spoilt |= self._owners == 0
            self._anything_spoilt = True
            self._fail(failure.status, list(zip(seq_ids, positions, tokens, strict=True)))
        if self.offloaded:
            beside()
        self.decoded += count
        logits = self._logits[:rows]
        if rows:
            logits_of([tokens[row] for row in wants], [contents[row] for row in wants], logits)
        if self._anything_spoilt and self._spoilt.any():
            logits[:] = np.nan
        return logits

    def _failure(self) -> Failure | None:
        failure = self._failures.pop(self.decodes, None)
        if failure is not None:
            self.broken = failure.lasting
        elif self.broken:
            failure = Failure(self.decodes)
        return failure

    def _fail(self, status: int, batch: list[tuple[int, int, int]]) -> NoReturn:
        self.failed.append(batch)
        raise DecodeFailedError(f"The context failed with status {status} while decoding {len(batch)} tokens.")

    def _attended(self, seq_ids: list[int], positions: list[int]) -> dict[int, int]:
        """Check what the sequences of a batch hold; return the sum of the terms of each one's cells."""
        unique = list(dict.fromkeys(seq_ids))
        holds = (self._owners[:, None] >> np.array(unique)) & 1
        sums = (self._data * (2 * self._at + 1).astype(np.uint64)) @ holds.astype(np.uint64)
        counts = holds.sum(axis=0).tolist()
        last = np.where(holds, self._at[:, None], -1).max(axis=0).tolist()
        first = np.where(holds, self._at[:, None], 1 << 40).min(axis=0).tolist()
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        for place, seq_id in enumerate(unique):
            whole = counts[place] == 0 or last[place] - first[place] + 1 == counts[place]
            self._check(whole, f"sequence {seq_id} has holes")
            if counts[place]:
                begins[seq_id], ends[seq_id] = first[place], last[place]
        for seq_id, position in zip(seq_ids, positions, strict=True):
            begin = begins.setdefault(seq_id, position)
            end = ends.get(seq_id, position - 1)
            self._check(position == end + 1, f"sequence {seq_id} goes on with position {position} after {end}")
            ends[seq_id] = position
            if seq_id != self.scratch:  # what lies there only fills a batch up
                self._check_window(seq_id, begin, position)
        return dict(zip(unique, sums.tolist(), strict=True))

    def _check_window(self, seq_id: int, begin: int, position: int) -> None:
        """Check that what a sequence holds from `begin` on is what the token at `position` is to see."""
        latest = 0 if self._window is None else max(0, position - self._window + 1)
        most = self.cells if self._window is None else self._window + self._window_chunk - 1
        seen = position - begin + 1
        self._check(begin <= latest and seen <= most, f"position {position} of sequence {seq_id} sees {seen} tokens")

    def _free_slots(self, count: int) -> NDArray[np.intp] | None:
        """Choose free cells as llama.cpp does: the first from where it found the last ones, or from the start."""
        free = (self._owners == 0).nonzero()[0]
        if len(free) < count:
            return None
        head = 0 if self._head > self.cells - len(free) + 2 * count else self._head
        begin = int(free.searchsorted(head))
        found: NDArray[np.intp] = free[begin : begin + count]
        missing = count - len(found)
        return np.concatenate((found, free[:missing])) if missing else found

    def copy(self, source: int, target: int) -> None:
        self._check_ids(source, target)
        self._check(source != target, f"sequence {source} is copied onto itself")
        self._check(not len(self._cells_of(target)), f"sequence {target} is copied to while it holds cells")
        self._owners[self._cells_to_copy(source)] |= 1 << target

    def _cells_to_copy(self, source: int) -> NDArray[np.intp]:
        return self._cells_of(source)

    def remove(self, seq_id: int, start: int, end: int) -> None:
        """Take positions ``[start, end)`` from a sequence; -1 leaves that side open."""
        self._check_ids(seq_id)
        cells = self._cells_of(seq_id)
        at = self._at[cells]
        if end >= 0:
            self.trims += start <= 0 and len(cells) > 0
            cells = cells[(at >= start) & (at < end)]
        elif start > 0:
            cells = cells[at >= start]
        self._let_go(seq_id, cells)

    def _let_go(self, seq_id: int, cells: NDArray[np.intp]) -> None:
        self._owners[cells] &= ~(1 << seq_id)
        freed = cells[self._owners[cells] == 0]
        if len(freed):
            self._head = min(self._head, int(freed[0]))

    def position_range(self, seq_id: int) -> tuple[int, int]:
        self._check_ids(seq_id)
        at = self._at[self._cells_of(seq_id)]
        return (int(at.min()), int(at.max())) if len(at) else (-1, -1)

    def _cells_of(self, seq_id: int) -> NDArray[np.intp]:
        return (self._owners & (1 << seq_id)).nonzero()[0]

    def save(self, seq_id: int, start: int, end: int) -> NDArray[np.uint8]:
        """Return the positions ``[start, end)`` of a sequence with their contents."""
        self._check_ids(seq_id)
        cells = self._cells_of(seq_id)
        at = self._at[cells]
        wanted = cells[(at >= start) & (at < end)]
        self._check(0 <= start < end, f"positions {start} to {end} are saved")
        self._check(len(wanted) == end - start, f"sequence {seq_id} does not hold all of {start} to {end}")
        wanted = wanted[np.argsort(self._at[wanted])]
        return np.stack((self._at[wanted].astype(np.uint64), self._data[wanted]), axis=1).view(np.uint8).ravel()

    def restore(self, seq_id: int, state: NDArray[np.uint8], *, behind: bool) -> bool:
        """Put a state in place of what a sequence holds, or behind it; False when there are too few cells."""
        self._check_ids(seq_id)
        self._check(len(state) > 0, "an empty state is restored")
        pairs = state.view(np.uint64).reshape(-1, 2)
        at = pairs[:, 0].astype(np.int64)
        if behind:
            last = self.position_range(seq_id)[1]
            self._check(int(at[0]) == last + 1, f"position {at[0]} is restored behind {last} of sequence {seq_id}")
        else:
            self._let_go(seq_id, self._cells_of(seq_id))
        slots = self._free_slots(len(at))
        if slots is None:
            return False
        self._data[slots], self._at[slots], self._owners[slots] = pairs[:, 1], at, 1 << seq_id
        self._spoilt[slots] = False
        self._head = (int(slots[-1]) + 1) % self.cells
        self.restored += 1
        return True

    def clear(self, *, zero: bool = False) -> None:
        """Forget all sequences; with `zero` also what the cells hold."""
        self._owners[:] = 0
        self._head = 0
        self.clears += 1
        if zero:
            self._data[:] = 0
            self._spoilt[:] = self._anything_spoilt = False

    def warm_up(self) -> None:
        """Decode one token, and forget it."""
        self.tokens[0], self.positions[0], self.seq_ids[0], self.wants_logits[0] = 1, 0, 0, 1
        try:
            self.decode(1, 1)
        except DecodeFailedError:
            self.broken = True
            raise
        self.decoded -= 1
        self.clear()

    def abort(self) -> None:
        self.broken = True

    close = abort

    def _check_ids(self, *seq_ids: int) -> None:
        for seq_id in seq_ids:
            self._check(0 <= seq_id <= self.scratch, f"there is no sequence {seq_id}")

    def _check(self, right: bool, message: str) -> None:
        if not right:
            self.violations.append(message)
            raise AssertionError(message)
