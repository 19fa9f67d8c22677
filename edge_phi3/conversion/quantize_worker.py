"""The child process that calls llama.cpp's quantiser: ``python -m edge_phi3.conversion.quantize_worker``.

llama.cpp cannot be interrupted while it quantises, ends the whole process when an assertion fails, and logs through one
callback per process. In a process of its own it can be killed at any moment, its crash becomes an error message, and
its log disturbs nobody. The protocol is one JSON value per line: jobs in on stdin, events out on stdout.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
from typing import IO, Any

import llama_cpp
import msgspec
import numpy as np
from llama_cpp._ggml import libggml

from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.conversion.quantize_process import Finished, Job, LogText, Ready, TensorType

_INTERMEDIATE = frozenset({"q8_1", "q8_k"})
"""Tensor types of activations within a dot product: ggml has no quantiser to a file for them."""

_UNQUANTIZED = frozenset({"f32", "f16", "bf16"})

_MAX_BUFFER = 256 << 20
"""Bytes of one tensor's rows held in memory at a time; llama.cpp's own 8 GiB is more than the edge has."""


def main() -> None:
    """Serve jobs until stdin ends, which is also how the death of the parent shows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever libraries print must not mix with the events.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: Ready | LogText | Finished) -> None:
        events.write(msgspec.json.encode(event) + b"\n")

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama-cpp-python has no types
    def log(_level: int, text: bytes, _user_data: object) -> None:
        emit(LogText(text.decode("utf-8", "replace")))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    emit(Ready(_tensor_types()))
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(sys.stdin.buffer, jobs), daemon=True).start()
    while True:
        emit(Finished(_run(jobs.get())))


def _read_jobs(stdin: IO[bytes], jobs: queue.SimpleQueue[Job]) -> None:
    for line in stdin:
        jobs.put(msgspec.json.decode(line, type=Job))
    os._exit(0)


def _run(job: Job) -> int:
    params = llama_cpp.llama_model_quantize_default_params()
    none = params.output_tensor_type
    params.ftype = job.ftype
    params.dry_run = job.output is None
    params.nthread = job.threads
    params.pure = job.pure
    params.allow_requantize = job.allow_requantize
    params.max_buf_size = _MAX_BUFFER
    params.output_tensor_type = none if job.output_tensor_type is None else job.output_tensor_type
    params.token_embedding_type = none if job.token_embedding_type is None else job.token_embedding_type
    # llama.cpp reads these arrays during the call, so that each must outlive it: `_alive`.
    _alive: list[object] = []
    if job.tensor_types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(job.tensor_types) + 1))()
        for override, (pattern, number) in zip(overrides, job.tensor_types, strict=False):
            override.pattern, override.type = pattern.encode(), number
        overrides[-1].type = none
        params.tt_overrides = overrides
        _alive.append(overrides)
    if job.imatrix is not None:
        matrix = read_imatrix(job.imatrix)
        data = _imatrix_array(matrix.importance(), _alive)
        # The same keys as llama-quantize writes, so that other tools show where a file came from.
        pairs: list[tuple[str, str | int]] = [("quantize.imatrix.file", os.path.basename(job.imatrix))]  # noqa: PTH119 (a string is all there is)
        if matrix.datasets:
            pairs.append(("quantize.imatrix.dataset", matrix.datasets[0]))
        pairs.append(("quantize.imatrix.entries_count", len(matrix.entries)))
        if matrix.chunk_count > 0:
            pairs.append(("quantize.imatrix.chunks_count", matrix.chunk_count))
        params.imatrix = data
        params.kv_overrides = _metadata_array(pairs, _alive)
    output = b"" if job.output is None else os.fsencode(job.output)
    return int(llama_cpp.llama_model_quantize(os.fsencode(job.source), output, ctypes.byref(params)))


def _imatrix_array(importance: dict[str, np.ndarray[Any, np.dtype[np.float32]]], alive: list[object]) -> Any:
    array = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    pointer = ctypes.POINTER(ctypes.c_float)
    for item, (name, values) in zip(array, importance.items(), strict=False):
        item.name, item.data, item.size = name.encode(), values.ctypes.data_as(pointer), values.size
    alive += [array, importance]
    return array


def _metadata_array(pairs: list[tuple[str, str | int]], alive: list[object]) -> Any:
    array = (llama_cpp.llama_model_kv_override * (len(pairs) + 1))()
    for item, (key, value) in zip(array, pairs, strict=False):
        item.key = key.encode()
        if isinstance(value, int):
            item.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            item.value.val_i64 = value
        else:
            item.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            item.value.val_str = value.encode()[:127]
    alive.append(array)
    return array


def _tensor_types() -> list[TensorType]:
    """List the tensor types that this llama.cpp can write, as ggml itself describes them."""
    libggml.ggml_type_name.restype = ctypes.c_char_p
    libggml.ggml_type_size.restype = ctypes.c_size_t
    libggml.ggml_blck_size.restype = ctypes.c_int64
    libggml.ggml_is_quantized.restype = ctypes.c_bool
    libggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    types = []
    for number in range(llama_cpp.llama_model_quantize_default_params().output_tensor_type):
        name = libggml.ggml_type_name(number).decode()
        quantized = bool(libggml.ggml_is_quantized(number))
        types.append(
            TensorType(
                name=name,
                number=number,
                block_size=int(libggml.ggml_blck_size(number)),
                block_bytes=int(libggml.ggml_type_size(number)),
                quantized=quantized,
                writable=name.lower() in _UNQUANTIZED or (quantized and name.lower() not in _INTERMEDIATE),
                needs_imatrix=bool(libggml.ggml_quantize_requires_imatrix(number)),
            )
        )
    return types


if __name__ == "__main__":
    main()
