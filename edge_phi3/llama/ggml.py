"""ggml's functions that llama-cpp-python does not declare, and the layout of ``struct ggml_tensor`` (ggml.h)."""

import ctypes
import functools
from typing import Any

import numpy as np
from llama_cpp import _ggml
from numpy.typing import NDArray

libggml: Any = _ggml.libggml

_MAX_DIMS, _MAX_OP_PARAMS, _MAX_SRC, _MAX_NAME = 4, 64, 10, 64

_OBJECT_SIZE = 32
"""Bytes of ``struct ggml_object``, which ``ggml_tensor_overhead`` counts beside the tensor."""


class GgmlTensor(ctypes.Structure):
    """``struct ggml_tensor``: a node of the graph. ``ne`` are its sizes, columns first, ``nb`` its strides in bytes."""


GgmlTensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * _MAX_DIMS),
    ("nb", ctypes.c_size_t * _MAX_DIMS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * (_MAX_OP_PARAMS // 4)),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(GgmlTensor) * _MAX_SRC),
    ("view_src", ctypes.POINTER(GgmlTensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * _MAX_NAME),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


_size, _int, _bool, _text, _pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_bool, ctypes.c_char_p, ctypes.c_void_p
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "ggml_backend_buffer_is_host": (_bool, _pointer),
    "ggml_backend_cpu_buffer_type": (_pointer,),
    "ggml_backend_dev_count": (_size,),
    "ggml_backend_dev_description": (_text, _pointer),
    "ggml_backend_dev_get": (_pointer, _size),
    "ggml_backend_dev_memory": (None, _pointer, ctypes.POINTER(_size), ctypes.POINTER(_size)),
    "ggml_backend_dev_type": (_int, _pointer),
    "ggml_backend_tensor_get": (None, ctypes.POINTER(GgmlTensor), _pointer, _size, _size),
    "ggml_blck_size": (ctypes.c_int64, _int),
    "ggml_is_quantized": (_bool, _int),
    "ggml_nbytes": (_size, ctypes.POINTER(GgmlTensor)),
    "ggml_op_name": (_text, _int),
    "ggml_quantize_requires_imatrix": (_bool, _int),
    "ggml_tensor_overhead": (_size,),
    "ggml_type_name": (_text, _int),
    "ggml_type_size": (_size, _int),
}
"""What each function returns, and what it takes."""

for _name, (_result, *_arguments) in _PROTOTYPES.items():
    _function = getattr(libggml, _name)
    _function.restype, _function.argtypes = _result, _arguments


def check_layout() -> None:
    """Raise `RuntimeError` unless ggml's ``struct ggml_tensor`` is as large as the one here."""
    if libggml.ggml_tensor_overhead() != _OBJECT_SIZE + ctypes.sizeof(GgmlTensor):
        raise RuntimeError("struct ggml_tensor has another layout than in the llama.cpp that edge-phi3 asks for")


@functools.cache
def operation(number: int) -> str:
    """Return the name of a node's ``op``: ``MUL_MAT``."""
    return str(libggml.ggml_op_name(number).decode())


def floats(tensor: GgmlTensor) -> NDArray[np.float32]:
    """Return the values of an F32 tensor, wherever they lie: a view on the CPU, a copy from another device.

    They are float32 of the shape ``ne`` reversed, columns last. A view is valid within the callback only.
    """
    size = libggml.ggml_nbytes(tensor)
    if libggml.ggml_backend_buffer_is_host(tensor.buffer):
        memory = (ctypes.c_char * size).from_address(tensor.data)
    else:
        memory = (ctypes.c_char * size)()
        libggml.ggml_backend_tensor_get(tensor, memory, 0, size)
    return np.ndarray(tuple(tensor.ne)[::-1], np.float32, memory, strides=tuple(tensor.nb)[::-1])


def weight_name(tensor: GgmlTensor) -> str:
    """Return the name that a weight has in the file; the scheduler calls its copies ``CUDA0#NAME#0``."""
    name: str = tensor.name.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name
