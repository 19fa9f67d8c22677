"""Writes tensors one chunk at a time: some are being converted while one is written and the disk is kept busy."""

from __future__ import annotations

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
from numpy.typing import NDArray

from edge_phi3.conversion.encode import encode
from edge_phi3.conversion.plan import PlannedTensor
from edge_phi3.conversion.safetensors import StoredTensor

# Values that are converted by one task and written at once.
_CHUNK = 1 << 20
_WORKERS = min(4, os.cpu_count() or 1)
_FLUSH_BYTES = 64 << 20


def append_tensors(path: Path, tensors: list[PlannedTensor], progress: Callable[[int, int, str], None] | None) -> None:
    """Append the data of `tensors` to the GGUF header in `path`, each aligned as the header promises.

    Memory in use stays at a few chunks whatever the size of a tensor: pages of the checkpoint are given
    back once they are written.

    Raises:
        CheckpointError: a value is NaN or infinite.
        ConversionError: a value is too large for its type.
        OSError: the disk is full, or broken.
    """
    total = sum(tensor.size for tensor in tensors)
    done = flushed = 0
    with (
        path.open("ab", buffering=0) as file,
        concurrent.futures.ThreadPoolExecutor(_WORKERS) as workers,
        concurrent.futures.ThreadPoolExecutor(1) as flusher,
    ):
        flush = flusher.submit(os.fdatasync, file.fileno())
        _write_all(file.write, _padding(file.tell()))
        for tensor in tensors:
            for chunk in _chunks(tensor, workers):
                _write_all(file.write, chunk.data.cast("B"))
                done += chunk.nbytes
                # The disk works while later chunks are converted; else it would begin when the last one is there.
                if done - flushed >= _FLUSH_BYTES and flush.done():
                    flush.result()
                    flushed = done
                    flush = flusher.submit(os.fdatasync, file.fileno())
                if progress is not None:
                    progress(done, total, tensor.name)
            _write_all(file.write, _padding(file.tell()))
        # The system tells of a failed write once: whoever syncs later would not hear of it.
        flush.result()


def _chunks(tensor: PlannedTensor, workers: concurrent.futures.Executor) -> Iterator[NDArray[Any]]:
    values = tensor.values
    if not isinstance(values, StoredTensor):
        yield values
        return
    pending: collections.deque[concurrent.futures.Future[NDArray[Any]]] = collections.deque()
    starts = iter(range(0, values.size, _CHUNK))
    try:
        for written in range(0, values.size, _CHUNK):
            while len(pending) <= 2 * _WORKERS and (start := next(starts, None)) is not None:
                chunk = values.read(start, min(start + _CHUNK, values.size))
                pending.append(workers.submit(encode, chunk, values.dtype, tensor.type, name=values.name))
            yield pending.popleft().result()
            values.drop(written, min(written + _CHUNK, values.size))
    finally:
        for future in pending:
            future.cancel()


def _write_all(write: Callable[[memoryview], int | None], data: memoryview) -> None:
    # A raw file may take a part only, such as the last bytes that fit on the disk.
    while data:
        data = data[write(data) or 0 :]


def _padding(position: int) -> memoryview:
    return memoryview(bytes(-position % gguf.GGUF_DEFAULT_ALIGNMENT))
