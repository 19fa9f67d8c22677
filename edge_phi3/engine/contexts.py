"""Which contexts of llama.cpp a model is served with, and what the engine requires of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.engine_settings import DEFAULT_CTX_SIZE, EngineSettings

MAX_PARALLEL = 255
"""Sequences that one llama.cpp context decodes together at most: it has 256 ids (LLAMA_MAX_SEQ), one is kept back."""

_GRAIN = 256
"""llama.cpp makes the cells of a context a multiple of this."""


class DecodeContext(Protocol):
    """A KV cache that sequences share, and the call that decodes a batch into it.

    Attributes:
        cells: KV cells.
        sequences: how many sequence ids there are, from 0.
        scratch: an id beyond them, empty between calls.
        batch_size: how many tokens one call takes at most.
        offloaded: whether the cells lie on a GPU.
        saves: whether `save` and `restore` are fast enough to be of use.
        tokens: the batch's token ids, int32, shape ``(batch_size,)``.
        positions: their positions, int32.
        seq_ids: their sequences, int32.
        wants_logits: which of them have logits that are wanted, int8.
    """

    cells: int
    sequences: int
    scratch: int
    batch_size: int
    offloaded: bool
    saves: bool
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    seq_ids: NDArray[np.int32]
    wants_logits: NDArray[np.int8]

    def decode(self, count: int, rows: int, beside: Callable[[], None] = ...) -> NDArray[np.float32]:
        """Decode the first `count` tokens of the batch, and return the logits that are wanted, in its order.

        Args:
            count: tokens in the batch.
            rows: how many logits are wanted.
            beside: called once, while a device of its own computes, or before this thread does.

        Returns:
            Shape ``(rows, vocab_size)``: a writable view that the next call overwrites.

        Raises:
            DecodeFailedError: it failed, was aborted, or found no free cells.
        """

    def copy(self, source: int, target: int) -> None:
        """Make `target` share all cells of `source`."""

    def remove(self, seq_id: int, start: int, end: int) -> None:
        """Take positions ``[start, end)`` from a sequence; -1 leaves that side open."""

    def position_range(self, seq_id: int) -> tuple[int, int]:
        """Return the first and the last position of a sequence, or (-1, -1)."""

    def save(self, seq_id: int, start: int, end: int) -> NDArray[np.uint8]:
        """Return a copy of the keys and values of the positions ``[start, end)``, shape ``(bytes,)``."""

    def restore(self, seq_id: int, state: NDArray[np.uint8], *, behind: bool) -> bool:
        """Put what `save` returned into a sequence, in place of what it holds or behind it; False when that failed."""

    def clear(self, *, zero: bool = False) -> None:
        """Empty the cache, and overwrite it if wanted."""

    def warm_up(self) -> None:
        """Decode one token, and forget it.

        Raises:
            DecodeFailedError: the context does not work.
        """

    def abort(self) -> None:
        """Make the running call of `decode`, and any later one, fail soon. From any thread."""

    def close(self) -> None:
        """Free the context."""


@dataclass(frozen=True, slots=True)
class ContextShape:
    """One context.

    Attributes:
        cells: KV cells.
        sequences: how many sequence ids there are.
        max_tokens: how long its sequences may get; None for as long as its cells allow.
    """

    cells: int
    sequences: int
    max_tokens: int | None


def context_shapes(settings: EngineSettings, context_length: int, original: int | None) -> list[ContextShape]:
    """Return the contexts to make: one, or for a model with two sets of rotary factors up to two.

    The first of two takes sequences up to the original context, the second, of ``--ctx-size`` cells, the longer ones.
    The first has half as many cells, but room for at least one and at most ``--parallel`` whole sequences.

    Args:
        settings: how many cells the contexts have, and how many sequences they decode at once.
        context_length: tokens that the model was trained for.
        original: the context beyond which the long rotary factors hold; None for a model without them.
    """
    parallel = min(settings.parallel, MAX_PARALLEL)
    cells = _rounded(settings.ctx_size or min(context_length, DEFAULT_CTX_SIZE))
    if original is None:
        return [ContextShape(cells, parallel, None)]
    if (settings.ctx_size or context_length) <= original:
        return [ContextShape(cells, parallel, original)]
    short = _rounded(min(max(original, cells // 2), parallel * original))
    # llama.cpp takes the long factors in a context that is larger than the short one.
    return [ContextShape(short, parallel, original), ContextShape(max(cells, short + _GRAIN), parallel, None)]


def _rounded(cells: int) -> int:
    return -(-cells // _GRAIN) * _GRAIN
