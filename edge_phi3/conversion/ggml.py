"""What ggml hands to an evaluation callback: the layout of ``struct ggml_tensor`` (ggml.h), and views of its data."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

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


class Ggml:
    """The functions of ggml that a callback needs.

    Args:
        library: ggml's shared library.

    Raises:
        RuntimeError: its ``struct ggml_tensor`` has another size than the one known here.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        library.ggml_tensor_overhead.restype = ctypes.c_size_t
        if library.ggml_tensor_overhead() != _OBJECT_SIZE + ctypes.sizeof(GgmlTensor):
            raise RuntimeError("struct ggml_tensor has another layout than in the llama.cpp that edge-phi3 asks for")
        self._op_name = library.ggml_op_name
        self._op_name.argtypes, self._op_name.restype = [ctypes.c_int], ctypes.c_char_p
        self._is_host = library.ggml_backend_buffer_is_host
        self._is_host.argtypes, self._is_host.restype = [ctypes.c_void_p], ctypes.c_bool
        self._nbytes = library.ggml_nbytes
        self._nbytes.argtypes, self._nbytes.restype = [ctypes.POINTER(GgmlTensor)], ctypes.c_size_t
        self._get = library.ggml_backend_tensor_get
        self._get.argtypes = [ctypes.POINTER(GgmlTensor), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._get.restype = None
        self._names: dict[int, str] = {}

    def operation(self, tensor: GgmlTensor) -> str:
        """Give the name of the operation that makes a node: ``MUL_MAT``."""
        if tensor.op not in self._names:
            self._names[tensor.op] = self._op_name(tensor.op).decode()
        return self._names[tensor.op]

    def floats(self, tensor: GgmlTensor) -> NDArray[np.float32]:
        """Give the values of an F32 tensor, wherever they lie: a view on the CPU, a copy from another device.

        Returns:
            float32, shape ``ne`` reversed: four axes, columns last. A view is valid within the callback only.
        """
        size = self._nbytes(tensor)
        if self._is_host(tensor.buffer):
            memory = (ctypes.c_char * size).from_address(tensor.data)
        else:
            memory = (ctypes.c_char * size)()
            self._get(tensor, memory, 0, size)
        return np.ndarray(tuple(tensor.ne)[::-1], np.float32, memory, strides=tuple(tensor.nb)[::-1])


def weight_name(tensor: GgmlTensor) -> str:
    """Give the name that a weight has in the file; the scheduler calls its copies ``CUDA0#NAME#0``."""
    name: str = tensor.name.decode("utf-8", "replace")
    return name.split("#")[1] if "#" in name else name
