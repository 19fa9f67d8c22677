"""The child process that asks llama.cpp what it would allocate: ``python -m edge_phi3.llama.memory_worker``.

llama.cpp can load a model and make contexts without allocating them, to plan their memory (``no_alloc``), and says in
its log what it found.
"""

import ctypes
import logging.handlers
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

from edge_phi3.llama import PlanningError
from edge_phi3.llama.backend import initialise_backend, reason, supports_gpu_offload
from edge_phi3.llama.child_process import Emit, serve_jobs
from edge_phi3.llama.context import context_parameters
from edge_phi3.llama.ggml import libggml
from edge_phi3.llama.memory import Answer, ContextMemory, Device, Job, Ready, context_memory
from edge_phi3.llama.options import ContextOptions

_GPU, _INTEGRATED = 1, 2
"""Of ``enum ggml_backend_dev_type``."""
_PLACED = re.compile(r"tensor (\S+) \(\d+ MiB \S+\) buffer type overridden to (\S+)")


class _Override(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``: tensors of a pattern, and the kind of buffer for them."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


_log = logging.handlers.BufferingHandler(sys.maxsize)
"""Keeps llama.cpp's log."""


def _taken() -> list[str]:
    """Return the lines since the last call."""
    lines = [record.getMessage() for record in _log.buffer]
    _log.flush()
    return lines


def _start(emit: Emit) -> None:
    logger = logging.getLogger(__package__)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_log)
    initialise_backend()
    emit(Ready(supports_gpu_offload(), _devices()))


def _devices() -> list[Device]:
    """Return what llama.cpp would offload to: all GPUs, or where there is none an integrated one."""
    handles = [libggml.ggml_backend_dev_get(index) for index in range(libggml.ggml_backend_dev_count())]
    found = [(handle, libggml.ggml_backend_dev_type(handle)) for handle in handles]
    devices = []
    for handle, kind in [one for one in found if one[1] == _GPU] or [one for one in found if one[1] == _INTEGRATED][:1]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        libggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        name = libggml.ggml_backend_dev_description(handle).decode("utf-8", "replace")
        devices.append(Device(name, free.value, total.value, kind == _INTEGRATED))
    return devices


def _answer(job: Job, emit: Emit) -> None:
    # Told to keep tensors where the CPU computes, llama.cpp says in which of its buffers each goes: in the mapped
    # file, or in one of its own with the weights in another order (repacked).
    with _loaded(job, host_tensors=job.host_tensors):
        buffers = {(match[1], match[2]) for line in _taken() if (match := _PLACED.search(line))}
    contexts = []
    if job.contexts:
        with _loaded(job) as model:
            contexts = [_memory(model, *shape, job.options) for shape in job.contexts]
    emit(Answer(buffers, contexts))


def _memory(model: Any, cells: int, sequences: int, options: ContextOptions) -> ContextMemory:
    params = context_parameters(cells=cells, sequences=sequences, settings=options)
    _taken()
    # Planning, llama.cpp lays out the graph of a prompt alone. That of one token of each sequence can take more
    # beside the GPU, which is handed large batches even of layers that lie in main memory, and small ones not.
    for batch in (params.n_ubatch, min(params.n_ubatch, params.n_seq_max)):
        params.n_ubatch = batch
        context = llama_cpp.llama_init_from_model(model, params)
        if not context:
            raise PlanningError(f"it cannot make a context of {cells} KV cells{reason()}")
        llama_cpp.llama_free(context)
    return context_memory(_taken())


@contextmanager
def _loaded(job: Job, host_tensors: str | None = None) -> Iterator[Any]:
    """Load a model without its weights; `host_tensors` is a pattern of tensors that are to stay off the GPU."""
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = job.n_gpu_layers
    overrides = (_Override * 2)()
    if host_tensors is not None:
        overrides[0].pattern, overrides[0].buft = host_tensors.encode(), libggml.ggml_backend_cpu_buffer_type()
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    _taken()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(job.model), params)
    if not model:
        raise PlanningError(f"it cannot load the model{reason()}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    serve_jobs(Job, _answer, ready=_start)
