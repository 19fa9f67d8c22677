"""Importance matrix files: llama.cpp's GGUF format, and the older binary one that is still published."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import atomic_output, read_bounded, read_start
from edge_phi3.gguf_file import GgufError, TensorInfo, read_gguf

_SUMS = ".in_sum2"
_COUNTS = ".counts"

_MAX_LEGACY = 1 << 30
"""Bytes of the older format; a matrix of Phi-4 has 17 MiB."""


class ImatrixFileError(EdgePhi3Error):
    """A file that is not a whole importance matrix."""


class ImatrixEntry(NamedTuple):
    """What calibration saw of one weight matrix: squared activations, summed over tokens (older files: evaluations).

    `sums` is float32, shape (experts, columns); `counts` is float32, shape (experts,): how many were added.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Imatrix:
    """An importance matrix: for each weight matrix, by its tensor name, how much each column matters.

    `datasets` names the calibration texts. `chunk_count` is 0 when the file does not say, and `chunk_size`, in tokens,
    is 0 in the older format, whose entries count chunks and not tokens.
    """

    entries: dict[str, ImatrixEntry]
    datasets: list[str] = field(default_factory=list)
    chunk_count: int = 0
    chunk_size: int = 0

    def importance(self) -> dict[str, NDArray[np.float32]]:
        """Return the mean squared activation of each column, as the quantiser takes it.

        Follows llama.cpp's ``tools/quantize``: sums over counts, in float32; an expert never seen weighs 1 everywhere.
        Each array is float32 of shape (experts * columns,).
        """
        means = {}
        for name, entry in self.entries.items():
            seen = (entry.counts > 0)[:, None]
            counts = np.where(seen, np.maximum(entry.counts, 1)[:, None], np.float32(1))
            means[name] = np.where(seen, entry.sums / counts, np.float32(1)).astype(np.float32).reshape(-1)
        return means


def read_imatrix(path: Path | str) -> Imatrix:
    """Read an importance matrix, in the GGUF format or the older binary one."""
    path = Path(path)
    try:
        matrix = _read_gguf(path) if read_start(path) == b"GGUF" else _read_legacy(path)
    except OSError as error:
        raise ImatrixFileError(f"The importance matrix {path} cannot be read: {error.strerror}.") from error
    except (ValueError, GgufError, struct.error) as error:
        raise ImatrixFileError(f"{path} is not a whole importance matrix: {error}.") from error
    for name, entry in matrix.entries.items():
        if not np.isfinite(entry.sums).all() or not np.isfinite(entry.counts).all():
            raise ImatrixFileError(f"The importance matrix {path} holds NaN or infinite values for {name}.")
    return matrix


def write_imatrix(path: Path, matrix: Imatrix, *, force: bool = False) -> None:
    """Write an importance matrix in llama.cpp's GGUF format, whole or not at all."""
    writer = gguf.GGUFWriter(None, None)
    writer.add_type("imatrix")
    if matrix.datasets:
        writer.add_array("imatrix.datasets", matrix.datasets)
    writer.add_uint32("imatrix.chunk_count", matrix.chunk_count)
    writer.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        writer.add_tensor(name + _SUMS, entry.sums)
        writer.add_tensor(name + _COUNTS, entry.counts.reshape(-1, 1))
    try:
        with atomic_output(path, force=force) as temporary:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except OSError as error:
        raise ImatrixFileError(f"The importance matrix {path} cannot be written: {error.strerror}.") from error


def merge_imatrices(matrices: Sequence[Imatrix], chunk_size: int) -> Imatrix:
    """Add importance matrices of one model up, as llama-imatrix does; older ones count chunks, of `chunk_size` each."""
    entries: dict[str, ImatrixEntry] = {}
    for matrix in matrices:
        scale = np.float32(1 if matrix.chunk_size else chunk_size)
        for name, entry in matrix.entries.items():
            added = ImatrixEntry(entry.sums * scale, entry.counts * scale)
            if (before := entries.get(name)) is not None:
                if before.sums.shape != added.sums.shape:
                    raise ImatrixFileError(
                        f"The importance matrices are of different models: {name} has {before.sums.shape[-1]} columns"
                        f" in one and {added.sums.shape[-1]} in another."
                    )
                added = ImatrixEntry(before.sums + added.sums, before.counts + added.counts)
            entries[name] = added
    most = max((float(entry.counts.max()) for entry in entries.values()), default=0.0)
    datasets = [name for matrix in matrices for name in matrix.datasets]
    return Imatrix(entries, datasets, int(most) // chunk_size, chunk_size)


def _read_gguf(path: Path) -> Imatrix:
    header = read_gguf(path)
    kind = header.values.get("general.type")
    if kind not in {None, "imatrix"}:
        raise ValueError(f"it is a GGUF of type {kind!r}, not 'imatrix'")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        raise ValueError(f"it has no tensor whose name ends with {_SUMS}")
    if uncounted := [name for name in names if name + _COUNTS not in tensors]:
        raise ValueError(f"it has sums but no counts for {uncounted[0]}")
    entries = {}
    with path.open("rb") as file:

        def values(tensor: TensorInfo) -> NDArray[np.float32]:
            start, count = header.data_start + tensor.offset, math.prod(tensor.shape)
            if tensor.type != gguf.GGMLQuantizationType.F32 or start + 4 * count > header.size:
                raise ValueError(f"{tensor.name} is not F32, or ends beyond the file")
            file.seek(start)
            return np.frombuffer(file.read(4 * count), np.float32)

        for name in names:
            rows = values(tensors[name + _COUNTS])
            entries[name] = ImatrixEntry(values(tensors[name + _SUMS]).reshape(rows.size, -1), np.rint(rows))
    datasets, counts = header.values.get("imatrix.datasets", []), []
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        counts.append(header.values.get(key, 0))
        if type(counts[-1]) is not int or not 0 <= counts[-1] < 1 << 31:
            raise ValueError(f"{key} is {counts[-1]!r:.80}")
    return Imatrix(entries, datasets if isinstance(datasets, list) else [], *counts)


def _read_legacy(path: Path) -> Imatrix:
    """Read what `llama-imatrix` wrote before the GGUF format: int32 lengths, names, float32 sums; little-endian."""
    data = memoryview(read_bounded(path, _MAX_LEGACY))
    position = 0

    def take(size: int) -> memoryview:
        nonlocal position
        if size < 0 or position + size > len(data):
            raise ValueError("it ends early, or is another kind of file")
        position += size
        return data[position - size : position]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries = {}
    if (count := integer()) < 1:
        raise ValueError("it holds no entry")
    for _ in range(count):
        name = bytes(take(integer())).decode("utf-8")
        calls, columns = integer(), integer()
        if columns < 1:
            raise ValueError(f"it holds no value for {name}")
        sums = np.frombuffer(take(4 * columns), dtype="<f4").astype(np.float32)
        # Sums of files without a count are means already: dividing by 1 keeps them.
        entries[name] = ImatrixEntry(sums.reshape(1, -1), np.array([max(calls, 1)], dtype=np.float32))
    chunks, datasets = 0, []
    if position < len(data):
        chunks = integer()
        if position < len(data):
            datasets = [bytes(take(integer())).decode("utf-8", "replace")]
    return Imatrix(entries, datasets=datasets, chunk_count=chunks)
