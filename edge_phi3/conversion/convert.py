"""Streams a checkpoint into a GGUF, one piece of one tensor at a time.

The output's tensors are byte for byte those of llama.cpp's ``convert_hf_to_gguf.py``; so is its metadata,
but for ``general.*`` and the keys described in `edge_phi3.conversion.metadata` and
`edge_phi3.conversion.vocabulary`. With `outtype` ``auto`` the matrices keep the checkpoint's own type,
float32 included (llama.cpp's converter makes that f16).
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from edge_phi3.conversion.checkpoint import Checkpoint, open_checkpoint
from edge_phi3.conversion.encode import STORED_TYPES, encode, encoded_size, tensor_type
from edge_phi3.conversion.errors import CheckpointError, ConversionError
from edge_phi3.conversion.metadata import (
    SourceInfo,
    write_general_metadata,
    write_generation_metadata,
)
from edge_phi3.conversion.phi3 import Phi3, read_phi3
from edge_phi3.conversion.safetensors import StoredTensor
from edge_phi3.conversion.vocabulary import read_vocabulary
from edge_phi3.files import atomic_output

__all__ = ["OUTTYPES", "ConversionProgress", "ConversionResult", "SourceInfo", "convert"]

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
"""What `convert` accepts as `outtype`."""

_FILE_TYPES = {
    GgmlType.F32: gguf.LlamaFileType.ALL_F32,
    GgmlType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GgmlType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    GgmlType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}

# Values converted at once: few enough that all intermediate results stay in a core's cache.
_CHUNK = 1 << 18
_WORKERS = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class ConversionProgress:
    """How far a conversion is: the tensor being written, and bytes of tensor data."""

    tensor: str
    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class ConversionResult:
    """A finished conversion.

    Attributes:
        path: the GGUF.
        outtype: the type of its matrices: f32, f16, bf16 or q8_0.
        tensors: how many it has.
        size: its bytes.
        seconds: how long it took.
    """

    path: Path
    outtype: str
    tensors: int
    size: int
    seconds: float


def convert(
    checkpoint: Path,
    output: Path,
    *,
    outtype: str = "auto",
    force: bool = False,
    source: SourceInfo | None = None,
    progress: Callable[[ConversionProgress], None] | None = None,
) -> ConversionResult:
    """Convert a Phi-3 checkpoint to a GGUF.

    Args:
        checkpoint: a folder in the Hugging Face layout.
        output: the GGUF to write. On any error, an interruption included, nothing is left there.
        outtype: the type of the matrices: ``f32``, ``f16``, ``bf16``, ``q8_0``, or ``auto`` for the
            checkpoint's own.
        force: replace `output` when it exists.
        source: repository and revision of the checkpoint, when they are known; read from the path of a
            snapshot in the Hub's cache otherwise.
        progress: called after each piece of a tensor.

    Raises:
        ConversionError: the checkpoint cannot be converted, or the output not be written.
        OutputExistsError: `output` exists and `force` is false.
    """
    started = time.monotonic()
    if outtype not in OUTTYPES:
        raise ConversionError(f"The output type {outtype!r} does not exist; choose one of {', '.join(OUTTYPES)}.")
    opened = open_checkpoint(checkpoint)
    model = read_phi3(opened.config)
    plan = _plan(opened, model, outtype)
    with _sentences_for_system_errors(output), atomic_output(output, force=force) as temporary:
        _refuse_full_disk(temporary.parent, sum(tensor.size for tensor in plan.tensors))
        _write_header(temporary, opened, model, plan, source)
        with temporary.open("r+b", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            _write_tensors(file, plan.tensors, progress)
    return ConversionResult(
        output,
        plan.matrices.name.lower(),
        len(plan.tensors),
        output.stat().st_size,
        time.monotonic() - started,
    )


@dataclasses.dataclass(frozen=True)
class _PlannedTensor:
    """One tensor of the output; its values are stored in the checkpoint, or given (the rope factors)."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    values: StoredTensor | NDArray[np.float32]

    @property
    def size(self) -> int:
        return encoded_size(int(np.prod(self.shape)), self.type)


@dataclasses.dataclass(frozen=True)
class _Plan:
    matrices: GgmlType
    tensors: list[_PlannedTensor]


def _plan(checkpoint: Checkpoint, model: Phi3, outtype: str) -> _Plan:
    specs = model.tensors()
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if not _is_ignored(name, model)}
    if missing := sorted(specs.keys() - stored.keys()):
        raise CheckpointError(f"The checkpoint lacks {_some(missing)}; a shard may be missing.")
    if surplus := sorted(stored.keys() - specs.keys()):
        raise CheckpointError(
            f"The checkpoint has {_some(surplus)}, which a {model.num_hidden_layers}-layer Phi-3 lacks."
        )
    for name, tensor in stored.items():
        if tensor.shape != specs[name].shape:
            raise CheckpointError(
                f"{name} has the shape {list(tensor.shape)}, but config.json asks for {list(specs[name].shape)}."
            )
        if tensor.dtype not in STORED_TYPES:
            raise CheckpointError(f"{name} has the dtype {tensor.dtype}; BF16, F16 and F32 can be converted.")
    wanted = GgmlType[outtype.upper()] if outtype != "auto" else STORED_TYPES[_matrix_dtype(stored)]
    tensors = []
    if model.longrope is not None:
        for name, factor in (
            ("rope_factors_long.weight", model.longrope.long_factor),
            ("rope_factors_short.weight", model.longrope.short_factor),
        ):
            tensors.append(_PlannedTensor(name, factor.shape, GgmlType.F32, factor))
    for name, tensor in stored.items():
        spec = specs[name]
        tensors.append(_PlannedTensor(spec.name, spec.shape, tensor_type(spec.name, spec.shape, wanted), tensor))
    return _Plan(wanted, tensors)


def _is_ignored(name: str, model: Phi3) -> bool:
    # Old revisions stored the rotary frequencies; a tied output matrix repeats the embedding.
    return name.endswith(".rotary_emb.inv_freq") or (model.tie_word_embeddings and name == "lm_head.weight")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _matrix_dtype(stored: dict[str, StoredTensor]) -> str:
    sizes: collections.Counter[str] = collections.Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.size if len(tensor.shape) > 1 else 0
    return sizes.most_common(1)[0][0]


def _write_header(path: Path, checkpoint: Checkpoint, model: Phi3, plan: _Plan, source: SourceInfo | None) -> None:
    vocabulary = read_vocabulary(checkpoint.folder, model.vocab_size)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3])
    for tensor in plan.tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.type)
    write_general_metadata(writer, checkpoint, source, writer.get_total_parameter_count()[0])
    model.write_metadata(writer)
    writer.add_file_type(_FILE_TYPES[plan.matrices])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary.write_metadata(writer)
    write_generation_metadata(writer, checkpoint, vocabulary.tokens)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_tensors(
    file: BinaryIO, tensors: list[_PlannedTensor], progress: Callable[[ConversionProgress], None] | None
) -> None:
    total = sum(tensor.size for tensor in tensors)
    done = 0
    _pad(file)
    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        for tensor in tensors:
            for chunk in _chunks(tensor, pool):
                file.write(chunk.data)
                done += chunk.nbytes
                if progress is not None:
                    progress(ConversionProgress(tensor.name, done, total))
            if isinstance(tensor.values, StoredTensor):
                tensor.values.drop()
            _pad(file)


def _chunks(tensor: _PlannedTensor, pool: concurrent.futures.Executor) -> Iterator[NDArray[Any]]:
    values = tensor.values
    if not isinstance(values, StoredTensor):
        yield values
        return
    pending: collections.deque[concurrent.futures.Future[NDArray[Any]]] = collections.deque()
    try:
        for start in range(0, values.size, _CHUNK):
            if len(pending) > 2 * _WORKERS:
                yield pending.popleft().result()
            chunk = values.read(start, min(start + _CHUNK, values.size))
            pending.append(pool.submit(encode, chunk, values.dtype, tensor.type, name=values.name))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _refuse_full_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConversionError(f"{folder} has {free / 1e9:.1f} GB free, but the output takes {size / 1e9:.1f} GB.")


@contextlib.contextmanager
def _sentences_for_system_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = " Free some space or choose another folder." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ConversionError(f"{output} cannot be written: {error.strerror}.{hint}") from error
