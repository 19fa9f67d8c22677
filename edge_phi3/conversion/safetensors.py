"""The safetensors file format, read lazily and without trust.

Our own reader and not the ``safetensors`` package, because NumPy has no bfloat16: the package cannot hand out the two
bytes of each value as they lie in the file, which is all that a conversion needs. The checks are those of the format's
description (https://github.com/huggingface/safetensors#format): the header fits the file, each entry's byte range fits
its dtype and shape, and the ranges cover the data without overlap or gap.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Longest header that is read, as in the format's own implementation."""

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one value of each dtype."""

_RAW: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where its bytes are, and what they mean."""

    file: SafetensorsFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return values `start` to `stop` of the flattened tensor, as they lie in the memory-mapped file.

        Returns:
            A read-only view, shape (stop - start,): float32 for F32, else unsigned integers holding the bits.
        """
        dtype: np.dtype[Any] = np.dtype("<f4") if self.dtype == "F32" else _RAW[ITEM_SIZES[self.dtype]]
        offset = self.begin + start * dtype.itemsize
        return np.frombuffer(self.file.map(), dtype, stop - start, offset)

    def drop(self, start: int, stop: int) -> None:
        """Return the memory of values `start` to `stop` back to the system; they can still be read again."""
        item_size = ITEM_SIZES[self.dtype]
        begin = (self.begin + start * item_size) // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.map().madvise(mmap.MADV_DONTNEED, begin, self.begin + stop * item_size - begin)


class SafetensorsFile:
    """The checked header of a safetensors file; its data is mapped into memory when first read.

    Attributes:
        path: the file.
        tensors: by name, in the order of their bytes.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header of `path`.

        Raises:
            CheckpointError: the file cannot be read, or breaks the format.
        """
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                length = int.from_bytes(prefix, "little")
                if len(prefix) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                    raise self._damaged(
                        f"its header should be {length:,} bytes long, but the whole file has {size:,}"
                        if length > size - 8
                        else f"a header of {length:,} bytes is impossible"
                    )
                header = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        self.tensors = self._parse(header, data_start=8 + length, file_size=size)

    def map(self) -> mmap.mmap:
        """Return the whole file, mapped read-only."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._map.madvise(mmap.MADV_SEQUENTIAL)
        return self._map

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a sound safetensors file: {what}. Download it again.")

    def _parse(self, header: bytes, *, data_start: int, file_size: int) -> dict[str, StoredTensor]:
        try:
            entries = json.loads(header, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not valid JSON ({error})") from error
        if not isinstance(entries, dict):
            raise self._damaged("its header is not a JSON object")
        entries.pop("__metadata__", None)
        tensors = [self._entry(name, entry, data_start) for name, entry in entries.items()]
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
        if tensors and tensors[0].begin != data_start:
            raise self._damaged(f"its first tensor, {tensors[0].name}, does not begin where the header ends")
        for one, other in itertools.pairwise(tensors):
            if other.begin != one.end:
                relation = "overlap" if other.begin < one.end else "leave a gap between them"
                raise self._damaged(f"the bytes of {one.name} and {other.name} {relation}")
        end = tensors[-1].end if tensors else data_start
        if end > file_size:
            raise self._damaged(f"it is truncated: {end:,} bytes are needed and {file_size:,} are there")
        if end < file_size:
            raise self._damaged(f"{file_size - end:,} bytes at its end belong to no tensor")
        return {tensor.name: tensor for tensor in tensors}

    def _entry(self, name: str, entry: object, data_start: int) -> StoredTensor:
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise self._damaged(f"the entry of {name} lacks its dtype, shape or data_offsets")
        if dtype not in ITEM_SIZES:
            raise self._damaged(f"{name} has the unknown dtype {dtype!r}")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise self._damaged(f"{name} has the impossible shape {shape}")
        if not 0 <= begin <= end:
            raise self._damaged(f"{name} has the impossible offsets {begin} to {end}")
        size = math.prod(shape) * ITEM_SIZES[dtype]
        if end - begin != size:
            raise self._damaged(
                f"{name} takes {end - begin:,} bytes, but {dtype} values of shape {shape} take {size:,}"
            )
        return StoredTensor(self, name, dtype, tuple(shape), data_start + begin, data_start + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content
