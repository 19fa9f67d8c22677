"""Engines on contexts that compute nothing."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_phi3.engine.batch_sizes import BatchSizes
from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.drafting import Drafting
from edge_phi3.engine.events import EventBatcher
from edge_phi3.engine.host_cache import HostCache
from edge_phi3.engine.kv_cache import KVCache
from edge_phi3.engine.model_runner import ModelRunner
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import ADAPTER_SHIFT
from edge_phi3.engine.speculation import Speculation
from edge_phi3.generation.decoding import Decoder
from edge_phi3.generation.sampling import SequenceDecoder
from tests.support.hash_context import HashContext
from tests.support.reference import contents_of, kind
from tests.support.scenarios import TEXTS, Scenario


class Foreseen(Drafting):
    """Drafts what is known to come, with a wrong token now and then.

    `coming` are the sequences of the whole answer, prompt included, or what returns them: None where there are none.
    `last` is the last draft, shape ``(rows, tokens)``.
    """

    def __init__(self, coming: Sequence[ArrayLike] | Callable[[], Sequence[ArrayLike] | None], *, wrong: int) -> None:
        super().__init__()
        self._coming, self._wrong = coming, wrong
        self.last = np.empty((0, 0), np.int32)

    def draft(self, decoder: Decoder, most: int) -> NDArray[np.int32]:
        sequences = self._coming() if callable(self._coming) else self._coming
        if sequences is None or not isinstance(decoder, SequenceDecoder):
            self.last = super().draft(decoder, most)
            return self.last
        length = decoder.history.length
        coming = [np.asarray(sequences[row], np.int32)[length : length + most] for row in decoder.live]
        draft = np.array([tokens[: min(map(len, coming))] for tokens in coming], np.int32)
        draft[:, (length + np.arange(draft.shape[1])) % 7 == 0] = self._wrong
        self.last = draft
        return draft


class CheckedHostCache(HostCache):
    """A host cache that checks what goes in, in so many `saves`; what comes out shows in the answers that follow."""

    def __init__(self, scenario: Scenario, rotary: int) -> None:
        super().__init__(scenario.host_cache or 0, scenario.block_size, scenario.per_step)
        self.saves = 0
        self._attention, self._rotary = scenario.attention, rotary
        self._known = scenario.window is None or scenario.window_chunk == 1

    def save(
        self,
        tokens: NDArray[np.int32],
        start: int,
        read: Callable[[int, int], NDArray[np.uint8]],
        go_on: Callable[[], bool] = lambda: True,
    ) -> bool:
        def checked(first: int, end: int) -> NDArray[np.uint8]:
            state = read(first, end)
            if self._known:
                first_token, *others = tokens[:end].tolist()
                adapter, first_token = divmod(first_token, 1 << ADAPTER_SHIFT)
                kept_as = kind(self._rotary, adapter)
                expected = contents_of([first_token, *others], self._attention, kept_as)[first:]
                positions, contents = state.view(np.uint64).reshape(-1, 2).T.tolist()
                right = positions[0] == first and contents == expected
                assert right, f"the host cache is given other contents than those of {tokens.tolist()} from {first} on"
            return state

        self.saves += 1
        whole = super().save(tokens, start, checked, go_on)
        blocks = self._blocks
        assert all(block.parent is None or block.parent in blocks for block in blocks), "a block lost its beginning"
        assert self.used == sum(len(block.state) for block in blocks) <= self.capacity, "bytes are counted wrongly"
        assert self.tokens == sum(block.end - block.start for block in blocks), "tokens are counted wrongly"
        return whole


def audit(kv: KVCache) -> None:
    """Check that the records of a cache are consistent, and agree with the positions that the context holds."""
    counted = np.zeros(kv.cells, np.int32)
    for seq_id in range(kv.sequences):
        start, length = kv.start[seq_id], kv.length[seq_id]
        np.add.at(counted, kv._held[seq_id][start:length], 1)
        held, expected = kv._context.position_range(seq_id), (start, length - 1) if length > start else (-1, -1)
        assert held == expected, f"sequence {seq_id}: the context holds {held}, the engine expects {expected}"
    assert np.array_equal(np.maximum(counted - 1, 0), kv._sharers), "shared cells are counted wrongly"
    free = kv._free_cells[: kv.free]
    assert len(np.unique(free)) == len(free), "a cell is free twice"
    assert not counted[free].any(), "a free cell is held"
    assert np.count_nonzero(counted) == kv.cells - kv.free, "used cells are counted wrongly"
    kept = np.zeros(kv.cells, np.int32)
    for seq_id in kv._kept:
        np.add.at(kept, kv._held[seq_id][kv.start[seq_id] : kv.length[seq_id]], 1)
    assert np.array_equal(kept, kv._keepers), "cells of finished sequences are counted wrongly"
    assert all(kv.length[seq_id] == 0 for seq_id in kv._free_ids), "a free sequence holds cells"


def make_core(scenario: Scenario, clock: Callable[[], float]) -> tuple[EngineCore, list[HashContext]]:
    """Return a scenario's engine, on the given clock, and its contexts."""
    contexts, runners = [], []
    for number in range(len(scenario.cells)):
        contexts.append(HashContext(scenario, number))
        sizes = {rows: float(size) for rows, size in enumerate(scenario.sizes, 1)}
        runners.append(
            ModelRunner(
                contexts[-1],  # type: ignore[arg-type]  # it has what the engine calls
                max_tokens=scenario.max_tokens if number == 0 else None,
                window=scenario.window,
                window_chunk=scenario.window_chunk,
                host_cache=None if scenario.host_cache is None else CheckedHostCache(scenario, number),
                retain=scenario.offloaded and scenario.share_prefixes,
                sizes=BatchSizes(sizes, tile=sum(scenario.sizes[:3])) if sizes else None,
                speculation=Speculation(scenario.drafts),
                turn=scenario.turn,
            )
        )
    scheduler = Scheduler(
        runners, parallel=scenario.parallel, share_prefixes=scenario.share_prefixes, exact_seeds=scenario.exact_seeds
    )
    core = EngineCore(
        scheduler, EventBatcher(0.0), max_queue=scenario.max_queue, token_texts=lambda: TEXTS, clock=clock
    )
    return core, contexts
