"""Streams a checkpoint into a GGUF: pieces of tensors are converted while one is written and the disk is kept busy.

The output's tensors are byte for byte those of llama.cpp's ``convert_hf_to_gguf.py``; so is its metadata, but for
``general.*`` and the keys described in `edge_phi3.conversion.metadata` and `edge_phi3.conversion.vocabulary`. With
`outtype` ``auto`` the matrices keep the checkpoint's own type, float32 included (llama.cpp's converter makes that f16).
"""

import collections
import concurrent.futures
import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from edge_phi3.conversion import ConversionError
from edge_phi3.conversion.adapter import is_adapter, plan_adapter
from edge_phi3.conversion.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from edge_phi3.conversion.metadata import SourceInfo, write_general_metadata, write_generation_metadata
from edge_phi3.conversion.phi3 import Phi3
from edge_phi3.conversion.plan import Plan, PlannedTensor, encode, plan_tensors, read_model
from edge_phi3.conversion.vocabulary import read_vocabulary
from edge_phi3.files import atomic_output, require_space

_logger = logging.getLogger(__name__)

# Values that are converted by one task and written at once.
_CHUNK = 1 << 20
_WORKERS = min(4, os.cpu_count() or 1)
_FLUSH_BYTES = 64 << 20


class ConversionResult(NamedTuple):
    """A finished conversion: the GGUF, the type of its matrices, the number of its tensors, and its bytes."""

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
    progress: Callable[[int, int, str], None] | None = None,
) -> ConversionResult:
    """Convert a checkpoint of the Phi family, a folder in the Hugging Face layout, or a LoRA adapter, to a GGUF.

    On any error, an interruption included, nothing is left at `output`. The type of the matrices is ``f32``, ``f16``,
    ``bf16``, ``q8_0``, or ``auto`` for the checkpoint's own. A `source` that is not given is read from the path of a
    snapshot in the Hub's cache. `progress` is called after each piece of a tensor, with the bytes that are done, those
    of all tensors, and the tensor's name.

    Raises:
        ConversionError: the checkpoint cannot be converted, or the output not be written.
        OutputExistsError, DiskFullError: `output` exists and `force` is false, or the disk has no room for it.
    """
    started = time.monotonic()
    if is_adapter(checkpoint):
        plan, header, stored = plan_adapter(checkpoint, outtype)
        _add_tensors(header, plan)
    else:
        opened = open_checkpoint(checkpoint)
        stored = [*opened.tensors.values()]
        model = read_model(opened)
        for note in (*opened.notes, *model.notes, *model.rope.notes):
            _logger.warning(note)
        plan = plan_tensors(opened.tensors, model, outtype)
        header = _header(opened, model, plan, source)
    if output.resolve() in {tensor.file.path.resolve() for tensor in stored}:
        raise ConversionError(f"{output} is a file of the checkpoint itself; give another output path.")
    try:
        with atomic_output(output, force=force) as temporary:
            require_space(temporary.parent, plan.size, str(output))
            with contextlib.closing(header):
                header.write_header_to_file(temporary)
                header.write_kv_data_to_file()
                header.write_ti_data_to_file()
            _append_tensors(temporary, plan.tensors, progress)
    except UnicodeEncodeError as error:
        raise ConversionError(f"A token or the chat template has half a character: {error}.") from error
    except OSError as error:
        hint = " Free some space or choose another folder." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ConversionError(f"{output} cannot be written: {error.strerror}.{hint}") from error
    seconds = time.monotonic() - started
    return ConversionResult(output, plan.matrices.name.lower(), len(plan.tensors), output.stat().st_size, seconds)


def _header(checkpoint: Checkpoint, model: Phi3, plan: Plan, source: SourceInfo | None) -> gguf.GGUFWriter:
    vocabulary = read_vocabulary(checkpoint.folder, model.vocab_size)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.PHI3])
    _add_tensors(writer, plan)
    parameters = writer.get_total_parameter_count()[0]
    write_general_metadata(writer, checkpoint, source, parameters, byte_level=vocabulary.words is not None)
    model.write_metadata(writer)
    vocabulary.write_metadata(writer)
    write_generation_metadata(writer, checkpoint, vocabulary.tokens)
    return writer


def _add_tensors(writer: gguf.GGUFWriter, plan: Plan) -> None:
    for tensor in plan.tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.type)
    share = "ALL" if plan.matrices == GgmlType.F32 else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{share}_{plan.matrices.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _append_tensors(path: Path, tensors: list[PlannedTensor], progress: Callable[[int, int, str], None] | None) -> None:
    # A few chunks are in memory at once, whatever the size of a tensor: written pages of the checkpoint are given back.
    total = sum(tensor.size for tensor in tensors)
    done = flushed = 0
    with (
        path.open("ab") as file,
        concurrent.futures.ThreadPoolExecutor(_WORKERS) as workers,
        concurrent.futures.ThreadPoolExecutor(1) as flusher,
    ):
        flush = flusher.submit(os.fdatasync, file.fileno())
        file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
        for tensor in tensors:
            for chunk in _chunks(tensor, workers):
                file.write(chunk.data)
                done += chunk.nbytes
                # The disk works while later chunks are converted; else it would begin when the last one is there.
                if done - flushed >= _FLUSH_BYTES and flush.done():
                    flush.result()
                    flushed = done
                    flush = flusher.submit(os.fdatasync, file.fileno())
                if progress is not None:
                    progress(done, total, tensor.name)
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
        # The system tells of a failed write once: whoever syncs later would not hear of it.
        flush.result()


def _chunks(tensor: PlannedTensor, workers: concurrent.futures.Executor) -> Iterator[NDArray[Any]]:
    if isinstance(tensor.values, np.ndarray):
        yield tensor.values
        return
    for part in tensor.values:
        yield from _encoded(part, tensor.type, workers)


def _encoded(values: StoredTensor, target: GgmlType, workers: concurrent.futures.Executor) -> Iterator[NDArray[Any]]:
    pending: collections.deque[concurrent.futures.Future[NDArray[Any]]] = collections.deque()
    starts = iter(range(0, values.size, _CHUNK))
    try:
        for written in range(0, values.size, _CHUNK):
            while len(pending) <= 2 * _WORKERS and (start := next(starts, None)) is not None:
                chunk = values.read(start, min(start + _CHUNK, values.size))
                pending.append(workers.submit(encode, chunk, values.dtype, target, name=values.name))
            yield pending.popleft().result()
            values.drop(written, min(written + _CHUNK, values.size))
    finally:
        for future in pending:
            future.cancel()
