"""The header of a GGUF file, whoever wrote it: metadata and where tensors lie, within bounds of size, number and depth.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count is weighed against what is left of the
file before anything is made of it, and the file is read, not mapped: one that is cut short meanwhile is an error.
"""

import math
import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import open_regular

MAX_HEADER = 64 << 20
"""Bytes of the largest header that is read; that of Phi-4-mini, with 400,000 tokens and merges, has 8 MiB."""
MAX_ENTRIES = 1 << 16
"""Keys, or tensors."""
_MAX_NAME, _MAX_DIMENSIONS = 63, 4  # GGML_MAX_NAME less its end, GGML_MAX_DIMS

_SPLIT = re.compile(r"-00001-of-(\d{5})\.gguf$")

STRING, ARRAY = 8, 9
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""The other types of values, as `struct` calls them."""


class GgufError(EdgePhi3Error):
    """A file that is no whole GGUF; the text ends a sentence that begins with its path, or with "it"."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: `shape` has the columns first, `type` is of ``enum ggml_type``, `offset` counts from `data_start`."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A header: values by key (texts, numbers, lists of texts, arrays of numbers), their types, and the tensors.

    `data_start` is where the tensors' bytes begin, and `size` what the whole file has.
    """

    path: Path
    values: dict[str, Any]
    types: dict[str, int]
    tensors: tuple[TensorInfo, ...]
    data_start: int
    size: int


def read_gguf(path: Path, skip: Collection[str] = ()) -> GgufFile:
    """Read the header of a GGUF file, without the values of keys to `skip`; `GgufError` where it is none or damaged."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        cursor = _Cursor(file, size)
        if (magic := file.read(4)) != b"GGUF":
            raise GgufError(f"it is not a GGUF file (it begins with {magic!r})")
        version, tensors, keys = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
        if version not in {2, 3}:
            raise GgufError(f"its version is {version}; 2 and 3 are known, in the order of bytes of this machine")
        if max(tensors, keys) > MAX_ENTRIES:
            raise GgufError(f"it claims to have {keys} keys and {tensors} tensors; {MAX_ENTRIES} are read at most")
        values: dict[str, Any] = {}
        types: dict[str, int] = {}
        for _ in range(keys):
            key, kind = cursor.name(), cursor.number("<I")
            if key in types:
                raise GgufError(f"it has the key {key!r} twice")
            value = cursor.value(key, kind)
            types[key] = kind
            if key not in skip:
                values[key] = value
        infos = tuple(cursor.tensor() for _ in range(tensors))
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 32 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            # Of less the format has an idea, and ggml none.
            raise GgufError(f"general.alignment is {alignment!r}; it must be a power of two from 32 on")
        if len({info.name for info in infos}) < len(infos):
            raise GgufError("it has two tensors of one name")
        return GgufFile(path, values, types, infos, -(-file.tell() // alignment) * alignment, size)


def split_files(source: Path) -> list[Path]:
    """Return the files of a GGUF, one unless its name is that of the first part of a split one."""
    match = _SPLIT.search(source.name)
    if match is None:
        return [source]
    stem, count = source.name[: match.start()], int(match[1])
    return [source.with_name(f"{stem}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]


class _Cursor:
    """Reads a header from the beginning, and never beyond the end of the file or the bounds."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, min(size, MAX_HEADER)

    def take(self, size: int) -> bytes:
        if size > self._left or len(data := self._file.read(size)) < size:
            raise GgufError(f"its header is cut short, damaged, or beyond {MAX_HEADER >> 20} MiB")
        self._left -= size
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> bytes:
        return self.take(self.number("<Q"))

    def name(self) -> str:
        text = self.text()
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise GgufError(f"the name {text[:64]!r} in it is not UTF-8") from None

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.text().decode(errors="replace")
        if kind == ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind == STRING:
                # Each has a length of 8 bytes at least, and so no more are begun than the file can hold.
                most = min(count, self._left // 8 + 1)
                return [self.text().decode(errors="surrogateescape") for _ in range(most)]
            if (code := _NUMBERS.get(kind)) is None:
                raise GgufError(f"{key} is an array of type {kind}; only texts and numbers can be in one")
            return np.frombuffer(self.take(count * struct.calcsize(code)), code)
        if (code := _NUMBERS.get(kind)) is None:
            raise GgufError(f"{key} has a value of type {kind}, which does not exist")
        value = self.number(code)
        if isinstance(value, float) and not math.isfinite(value):
            raise GgufError(f"{key} is {value}; it must be a finite number")
        return value

    def tensor(self) -> TensorInfo:
        name, dimensions = self.name(), self.number("<I")
        named = 0 < len(name.encode()) <= _MAX_NAME and name.isprintable() and " " not in name
        if not named or dimensions > _MAX_DIMENSIONS:
            raise GgufError(f"its tensor {name[:80]!r} has {dimensions} dimensions, or a name that none has")
        shape = tuple(self.number("<Q") for _ in range(dimensions))
        if math.prod(shape) >= 1 << 60:
            raise GgufError(f"its tensor {name!r} has the shape {list(shape)}, which no machine holds")
        return TensorInfo(name, shape, self.number("<I"), self.number("<Q"))
