"""The child process that calls llama.cpp's quantiser: ``python -m edge_phi3.llama.quantize_worker``."""

import ctypes
import os

import llama_cpp

from edge_phi3.llama.child_process import Emit, serve_jobs
from edge_phi3.llama.ggml import libggml
from edge_phi3.llama.model import metadata_overrides
from edge_phi3.llama.quantizer import Finished, Job, LogText, Ready, TensorType

_INTERMEDIATE = frozenset({"q8_1", "q8_k"})
"""Tensor types of activations within a dot product: ggml has no quantiser to a file for them."""

_UNQUANTIZED = frozenset({"f32", "f16", "bf16"})

_MAX_BUFFER = 256 << 20
"""Bytes of one tensor's rows held in memory at a time; llama.cpp's own 8 GiB is more than the edge has."""

_callbacks: list[object] = []
"""Kept alive as long as llama.cpp may call them."""


def _start(emit: Emit) -> None:
    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama-cpp-python has no types
    def log(_level: int, text: bytes, _user_data: object) -> None:
        emit(LogText(text.decode("utf-8", "replace")))

    _callbacks.append(log)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    emit(Ready(_tensor_types()))


def _run(job: Job, emit: Emit) -> None:
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
    if job.tensor_types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(job.tensor_types) + 1))()
        for override, (pattern, number) in zip(overrides, job.tensor_types, strict=False):
            override.pattern, override.type = pattern.encode(), number
        overrides[-1].type = none
        params.tt_overrides = overrides
    if job.importance:
        params.imatrix = array = (llama_cpp.llama_model_imatrix_data * (len(job.importance) + 1))()
        for item, (name, data) in zip(array, job.importance.items(), strict=False):
            values = (ctypes.c_float * (len(data) // ctypes.sizeof(ctypes.c_float))).from_buffer_copy(data)
            item.name, item.data, item.size = name.encode(), values, len(values)
    if job.metadata:
        params.kv_overrides = metadata_overrides(job.metadata)
    output = b"" if job.output is None else os.fsencode(job.output)
    emit(Finished(int(llama_cpp.llama_model_quantize(os.fsencode(job.source), output, ctypes.byref(params)))))


def _tensor_types() -> list[TensorType]:
    """Return the tensor types that this llama.cpp can write, as ggml itself describes them."""
    types = []
    for number in range(llama_cpp.llama_model_quantize_default_params().output_tensor_type):
        name = libggml.ggml_type_name(number).decode()
        quantized = libggml.ggml_is_quantized(number)
        types.append(
            TensorType(
                name=name,
                number=number,
                block_size=libggml.ggml_blck_size(number),
                block_bytes=libggml.ggml_type_size(number),
                quantized=quantized,
                writable=name.lower() in _UNQUANTIZED or (quantized and name.lower() not in _INTERMEDIATE),
                needs_imatrix=libggml.ggml_quantize_requires_imatrix(number),
            )
        )
    return types


if __name__ == "__main__":
    serve_jobs(Job, _run, ready=_start)
