"""The book-keeping of KV cells, against a model of it that keeps a set of cells for each sequence."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_phi3.engine.kv_cache import KVCache

CELLS, SEQUENCES = 96, 8


class Recorded:
    """A llama.cpp memory that keeps which position of a sequence lies in which cell."""

    cells, sequences = CELLS, SEQUENCES

    def __init__(self) -> None:
        self.positions: dict[int, set[int]] = {}

    def position_range(self, seq_id: int) -> tuple[int, int]:
        held = self.positions.get(seq_id)
        return (min(held), max(held)) if held else (-1, -1)

    def copy(self, source: int, target: int) -> None:
        self.positions[target] = set(self.positions.get(source, set()))

    def remove(self, seq_id: int, start: int, end: int) -> None:
        low, high = max(start, 0), end if end >= 0 else 1 << 30
        self.positions[seq_id] = {p for p in self.positions.get(seq_id, set()) if not low <= p < high}

    def clear(self, *, zero: bool = False) -> None:  # noqa: ARG002 - there is nothing to overwrite
        self.positions.clear()


class KVCacheMachine(RuleBasedStateMachine):
    """Any order of appending, forking, trimming and releasing."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Recorded()
        self.kv = KVCache(self.memory, window=None, host_cache=None)
        self.cells: dict[int, dict[int, object]] = {}

    @precondition(lambda self: self.kv.free_sequences)
    @rule()
    def acquire(self) -> None:
        self.cells[self.kv._acquire()] = {}

    @precondition(lambda self: self.cells)
    @rule(data=st.data(), count=st.integers(1, 20))
    def append(self, data: st.DataObject, count: int) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.cells)))
        count = min(count, self.kv.free)
        if count == 0:
            return
        start = self.kv.length[seq_id]
        self.kv.append(seq_id, count)
        for position in range(start, start + count):
            self.cells[seq_id][position] = object()
            self.memory.positions.setdefault(seq_id, set()).add(position)

    @precondition(lambda self: self.cells and self.kv.free_sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.cells)))
        start, end = self.kv.start[source], self.kv.length[source]
        length = data.draw(st.integers(start, end))
        target = self.kv._fork(source, length)
        self.cells[target] = {position: cell for position, cell in self.cells[source].items() if position < length}

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.cells)))
        start = data.draw(st.integers(0, self.kv.length[seq_id]))
        self.kv.trim(seq_id, start)
        self.cells[seq_id] = {position: cell for position, cell in self.cells[seq_id].items() if position >= start}

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.cells)))
        del self.cells[seq_id]
        self.kv.release(seq_id)

    @rule()
    def clear(self) -> None:
        self.kv.clear()
        self.cells.clear()

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.cells)))
        length = data.draw(st.integers(self.kv.start[seq_id], self.kv.length[seq_id]))
        self.kv._truncate(seq_id, length)
        self.cells[seq_id] = {position: cell for position, cell in self.cells[seq_id].items() if position < length}

    @invariant()
    def books_are_right(self) -> None:
        self.kv.audit()
        assert self.kv.used == len({cell for held in self.cells.values() for cell in held.values()})
        assert self.kv.free_sequences == SEQUENCES - len(self.cells)
        for seq_id, held in self.cells.items():
            assert self.memory.positions.get(seq_id, set()) == set(held)


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_audit_finds_a_leaked_cell() -> None:
    memory = Recorded()
    kv = KVCache(memory, window=None, host_cache=None)
    kv.append(kv._acquire(), 3)
    memory.positions[0] = {0, 1, 2}
    kv.audit()
    kv._sharers[kv._held[0][0]] += 1
    with pytest.raises(AssertionError):
        kv.audit()
