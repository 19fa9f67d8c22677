"""Requests that must repeat exactly: one at a time, in a context of their own.

llama.cpp's numbers depend in their last bits on what else is in a batch, on how many cells are in use and on which of
them a sequence got. A seed promises the same answer whatever runs beside it, so such a request begins with an empty
cache and shares neither batches nor cells. The context is made when the first of them comes, as large as it needs.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_phi3.engine.contexts import ContextShape
from edge_phi3.engine.errors import ModelLoadError, RequestTooLargeError
from edge_phi3.engine.runtime import Context
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import RunningRequest

_GRAIN = 256
"""llama.cpp's step of the cells that attention looks at: with multiples of it, their number in all changes nothing."""


class SoloScheduler(Scheduler):
    """Runs its requests one after the other.

    Args:
        make_context: makes a context; may raise `ModelLoadError`.
        shared: the scheduler that runs the same requests together.
        first: the first request.
        least: cells that the context has at least.
    """

    def __init__(
        self,
        make_context: Callable[[ContextShape], Context],
        shared: Scheduler,
        first: RunningRequest,
        *,
        least: int,
    ) -> None:
        self._make_context = make_context
        self._shared = shared
        self._least = least
        super().__init__(
            make_context(self._shape(first)),
            parallel=shared.parallel,
            window=shared.window,
            window_chunk=shared.window_chunk,
            max_tokens=shared.max_tokens,
        )

    def admit(self) -> None:
        """Start the next request in an empty context when the last one has left."""
        self.pool.settle()
        while self.waiting and not self.running:
            request = self.waiting[0]
            try:
                self._make_ready(self._shape(request))
            except ModelLoadError as error:
                self.waiting.remove(request)
                request.send(no_memory(error))
                continue
            super().admit()

    def _shape(self, request: RunningRequest) -> ContextShape:
        """Give the context that a request needs."""
        shared, rows = self._shared, request.rows
        longest = shared.max_tokens
        if longest is not None and rows > 1:
            # The rotary factors follow the cells per sequence: only a part for each sequence keeps them short.
            return ContextShape(rows * longest, rows, unified=False, max_tokens=longest)
        longest = min(request.max_length, longest or request.max_length)
        cells = max(shared.cells_for(request, longest, shared=True), self._least)
        cells = -(-cells // _GRAIN) * _GRAIN
        return ContextShape(cells, shared.parallel, unified=True, max_tokens=shared.max_tokens)

    def _make_ready(self, shape: ContextShape) -> None:
        present = self.context
        if (
            present.closed
            or present.unified != shape.unified
            or present.cells < shape.cells
            or present.sequences < shape.sequences
        ):
            present.close()
            self._use(self._make_context(shape))
            self.parallel = min(self._shared.parallel, self.context.sequences)
        self.kv.clear()

    def _has_cells_for(self, request: RunningRequest, rows: int) -> bool:  # noqa: ARG002 - alone, it always has
        return not self.running


def no_memory(error: ModelLoadError) -> RequestTooLargeError:
    """Explain that a request cannot run alone."""
    return RequestTooLargeError(f"seed: a request with a seed gets a context of its own. {error}")
