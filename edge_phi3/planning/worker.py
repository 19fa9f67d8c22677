"""The child process that asks llama.cpp what it would allocate: ``python -m edge_phi3.planning.worker``.

llama.cpp can load a model and make contexts without allocating them, to plan their memory (``no_alloc``), and tells in
its log what it found. In a process of its own that log disturbs nobody, an assertion that fails becomes an error
message, and a GPU's memory is free again at the end. Jobs come in on stdin as one JSON value, answers go out likewise.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec
from llama_cpp._ggml import libggml

from edge_phi3.engine.contexts import context_shapes
from edge_phi3.engine.settings import EngineSettings
from edge_phi3.llama.context import context_parameters
from edge_phi3.planning.process import Answer, AskedContext, Device, Job, Question, Replies

_ERROR_LEVEL = 4
_GPU, _INTEGRATED_GPU = 1, 2
"""Of ``enum ggml_backend_dev_type``."""

_lines: list[str] = []
_errors: list[str] = []


class _Override(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``: tensors of a pattern, and the kind of buffer for them."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama-cpp-python has no types
def _log(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    _lines.append(line)
    if level == _ERROR_LEVEL:
        _errors.append(line)


def main() -> None:
    """Answer all questions of stdin."""
    # Whatever libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    offload = bool(llama_cpp.llama_supports_gpu_offload())
    answers.write(msgspec.json.encode(Replies(offload, _devices(), [_answer(job) for job in question.jobs])))
    answers.flush()


def _devices() -> list[Device]:
    """Give what llama.cpp would offload to: all GPUs, or where there is none an integrated one."""
    count, get, kind = (getattr(libggml, f"ggml_backend_dev_{name}") for name in ("count", "get", "type"))
    count.restype, get.argtypes, get.restype = ctypes.c_size_t, [ctypes.c_size_t], ctypes.c_void_p
    kind.argtypes, kind.restype = [ctypes.c_void_p], ctypes.c_int
    found = [(handle, kind(handle)) for handle in map(get, range(count()))]
    chosen = [one for one in found if one[1] == _GPU] or [one for one in found if one[1] == _INTEGRATED_GPU][:1]
    return [_device(handle, shared=of_kind == _INTEGRATED_GPU) for handle, of_kind in chosen]


def _device(handle: int, *, shared: bool) -> Device:
    describe, memory = libggml.ggml_backend_dev_description, libggml.ggml_backend_dev_memory
    describe.argtypes, describe.restype = [ctypes.c_void_p], ctypes.c_char_p
    memory.argtypes, memory.restype = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2], None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    memory(handle, ctypes.byref(free), ctypes.byref(total))
    name = describe(handle).decode("utf-8", "replace")
    return Device(name, free.value, total.value, shared)


def _answer(job: Job) -> Answer:
    placed: list[str] = []
    if job.host_tensors is not None:
        with _planned(job, host_tensors=job.host_tensors) as (_, log):
            placed = log
    contexts = []
    if job.contexts is not None:
        with _planned(job) as (model, _):
            contexts = list(_contexts(model, job, job.contexts))
    return Answer(placed, contexts)


def _contexts(model: Any, job: Job, wanted: AskedContext) -> Iterator[list[str]]:
    settings = EngineSettings(
        Path(job.model),
        ctx_size=wanted.ctx_size,
        parallel=wanted.parallel,
        batch_size=wanted.batch_size,
        kv_cache_type=wanted.kv_cache_type,
        flash_attn=wanted.flash_attn,
    )
    for shape in context_shapes(settings, wanted.context_length, wanted.original_context):
        params = context_parameters(cells=shape.cells, sequences=shape.sequences, settings=settings)
        _lines.clear()
        # Planning, llama.cpp lays out the graph of a prompt alone. That of one token of each sequence can take more
        # beside the GPU, which is handed large batches even of layers that lie in main memory, and small ones not.
        for batch in (params.n_ubatch, min(params.n_ubatch, params.n_seq_max)):
            params.n_ubatch = batch
            context = llama_cpp.llama_init_from_model(model, params)
            if not context:
                sys.exit(f"it cannot make a context of {shape.cells} KV cells{_reason()}")
            llama_cpp.llama_free(context)
        yield list(_lines)


@contextmanager
def _planned(job: Job, host_tensors: str | None = None) -> Iterator[tuple[Any, list[str]]]:
    """Load a model without its weights; give it and llama.cpp's log.

    `host_tensors` is a pattern of tensors that are to stay where the CPU computes. llama.cpp then says in which of its
    buffers each goes: in the mapped file, or in one of its own with the weights in another order (repacked).
    """
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = job.n_gpu_layers
    overrides = (_Override * 2)()
    if host_tensors is not None:
        cpu = libggml.ggml_backend_cpu_buffer_type
        cpu.restype = ctypes.c_void_p
        overrides[0].pattern, overrides[0].buft = host_tensors.encode(), cpu()
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    _lines.clear()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(job.model), params)
    if not model:
        sys.exit(f"it cannot load the model{_reason()}")
    try:
        yield model, list(_lines)
    finally:
        llama_cpp.llama_model_free(model)


def _reason() -> str:
    return f" ({_errors[0]})" if _errors else ""


if __name__ == "__main__":
    main()
