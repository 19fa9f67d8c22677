"""Safetensors files, read lazily.

The ``safetensors`` package checks a file's header against the format, and tells each tensor's dtype and shape and their
order; a sound file has no gap between them. Values are taken from the mapped file, since NumPy has no bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edge_phi3.conversion.errors import CheckpointError
from edge_phi3.files import open_regular

_RAW: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where its bytes begin, and what they mean."""

    file: SafetensorsFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes; every dtype's name tells its bits, but for that of booleans."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * (int(bits[0]) if bits else 8) // 8

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return values `start` to `stop` of a flattened F32, F16 or BF16 tensor, as they lie in the mapped file.

        A read-only view, shape (stop - start,): float32 for F32, else uint16 holding the bits.
        """
        dtype = _RAW[self.dtype]
        return np.frombuffer(self.file.map, dtype, stop - start, self.begin + start * dtype.itemsize)

    def equals(self, other: StoredTensor) -> bool:
        """Return whether another tensor has the same type, shape and bytes."""
        mine, theirs = (memoryview(one.file.map)[one.begin : one.begin + one.nbytes] for one in (self, other))
        return (self.dtype, self.shape) == (other.dtype, other.shape) and mine == theirs

    def drop(self, start: int, stop: int) -> None:
        """Return the memory of values `start` to `stop` back to the system; they can still be read again."""
        item_size = _RAW[self.dtype].itemsize
        begin = (self.begin + start * item_size) // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.map.madvise(mmap.MADV_DONTNEED, begin, self.begin + stop * item_size - begin)


class SafetensorsFile:
    """A safetensors file with a sound header; its tensors are in the order of their bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with open_regular(path) as file, safe_open(path, "numpy") as header:
                begin = 8 + int.from_bytes(file.read(8), "little")
                for name in header.offset_keys():
                    entry = header.get_slice(name)
                    tensor = StoredTensor(self, name, entry.get_dtype(), tuple(entry.get_shape()), begin)
                    self.tensors[name] = tensor
                    begin += tensor.nbytes
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a sound safetensors file ({error}). Download it again.") from error

    @functools.cached_property
    def map(self) -> mmap.mmap:
        """The whole file, mapped read-only."""
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        return mapped
