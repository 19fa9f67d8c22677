"""Log-probabilities of the whole vocabulary at many positions, in the file format of ``llama-perplexity``.

The format is that of llama.cpp's ``tools/perplexity/perplexity.cpp`` (``--kl-divergence-base``), little-endian: the
bytes ``_logits_``; int32 context size, vocabulary size, number of chunks; the tokens of all chunks, int32; then for
each scored position float32 scale and minimum, and one uint16 for each word of the vocabulary (one more where their
number is odd). A word's log-probability is ``scale * uint16 + minimum``, and what lies more than 16 nats below the top
counts as that far.

It was chosen over float32 for two reasons. It takes half of the disk: 16 MB instead of 33 for each chunk of 512 tokens
of Phi-3's vocabulary, with steps of 16 / 65535 = 0.00024 nats at most, whose errors have no sign and cancel out in
means. And llama-perplexity reads what is written here, tokens included, so that both can be asked about the very same
positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.bench.errors import BenchError
from edge_phi3.files import atomic_output

_MAGIC = b"_logits_"
_HEAD = 4
"""uint16 words in front of each position's values: two float32."""
_RANGE = np.float32(16)
_LEVELS = np.float32(65535)


def scored_positions(ctx_size: int) -> int:
    """Return the number of scored positions of a chunk: its second half but the last, whose successor is unknown."""
    return ctx_size - 1 - ctx_size // 2


def compress(logits: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Pack logits, shape ``(rows, vocab_size)``, as the file holds them.

    Raises:
        BenchError: a row has NaN or infinite logits.
    """
    rows, vocab_size = logits.shape
    top = logits.max(axis=1, keepdims=True)
    floor = np.maximum(logits.min(axis=1, keepdims=True), top - _RANGE)
    normaliser = np.log(np.exp(logits - top).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    if not np.isfinite(normaliser).all():
        raise BenchError("The model gives logits that are NaN or infinite; convert or download it again.")
    scale = (top - floor) / _LEVELS
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    packed = np.zeros((rows, _row_size(vocab_size)), np.uint16)
    packed[:, :_HEAD] = np.hstack([scale, floor - top - normaliser]).view(np.uint16)
    packed[:, _HEAD : _HEAD + vocab_size] = np.rint((logits - floor) * inverse).clip(0, _LEVELS)
    return packed


@dataclass(frozen=True)
class LogitsFile:
    """A file of log-probabilities, mapped into memory: only the rows that are read take any.

    Attributes:
        path: where it lies.
        tokens: int32, shape ``(chunks, ctx_size)``.
        vocab_size: columns.
    """

    path: Path
    tokens: NDArray[np.int32]
    vocab_size: int
    _packed: NDArray[np.uint16]

    @classmethod
    def open(cls, path: Path) -> LogitsFile:
        """Open a file.

        Raises:
            BenchError: it is absent, not of this format, or not whole.
        """
        try:
            with path.open("rb") as file:
                magic = file.read(len(_MAGIC))
                head = np.fromfile(file, "<i4", 3)
                if magic != _MAGIC or len(head) < 3 or (head <= 0).any():
                    raise BenchError(f"{path} is not a file of log-probabilities as llama-perplexity writes them.")
                ctx_size, vocab_size, chunks = head.tolist()
                tokens = np.fromfile(file, "<i4", chunks * ctx_size)
                begin = file.tell()
        except OSError as error:
            raise BenchError(f"The log-probabilities {path} cannot be read: {error.strerror}.") from error
        shape = chunks * scored_positions(ctx_size), _row_size(vocab_size)
        if path.stat().st_size != begin + 2 * shape[0] * shape[1]:
            raise BenchError(f"{path} is not whole; delete it, and it will be made again.")
        packed = np.memmap(path, "<u2", "r", begin, shape)
        return cls(path, tokens.reshape(chunks, ctx_size).astype(np.int32), vocab_size, packed)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return log-probabilities, ``(stop - start, vocab_size)``, of scored positions counted over all chunks."""
        packed = np.asarray(self._packed[start:stop])
        head = np.ascontiguousarray(packed[:, :_HEAD]).view(np.float32)
        values: NDArray[np.float32] = packed[:, _HEAD : _HEAD + self.vocab_size] * head[:, :1] + head[:, 1:]
        return values


class LogitsWriter:
    """Takes the scored positions in their order. `writing` makes one."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, logits: NDArray[np.float32]) -> None:
        """Add positions, shape ``(rows, vocab_size)``."""
        self._file.write(compress(logits).astype("<u2", copy=False).data)


@contextlib.contextmanager
def writing(path: Path, tokens: NDArray[np.int32], vocab_size: int) -> Iterator[LogitsWriter]:
    """Write a file, whole or not at all.

    Args:
        path: the file; replaced when it exists.
        tokens: what is evaluated, shape ``(chunks, ctx_size)``.
        vocab_size: columns of the logits.
    """
    with atomic_output(path, force=True) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC)
        file.write(np.array([tokens.shape[1], vocab_size, len(tokens)], "<i4").tobytes())
        file.write(tokens.astype("<i4").tobytes())
        yield LogitsWriter(file)


def _row_size(vocab_size: int) -> int:
    return vocab_size + vocab_size % 2 + _HEAD
