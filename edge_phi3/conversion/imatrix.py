"""Importance matrices: how much each column of each weight matrix matters, measured on calibration text.

While llama.cpp evaluates the text, its callback (``cb_eval``) is shown each matrix product; the squares of the
activations are summed per column. Follows llama.cpp's ``tools/imatrix``: the same chunks, the same tensors, sums and
counts that are not divided until a quantiser reads them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

from edge_phi3.conversion.ggml import Ggml, GgmlTensor, weight_name
from edge_phi3.conversion.imatrix_file import Imatrix, ImatrixEntry, merge_imatrices, write_imatrix
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import OutputExistsError

CALIBRATION_NAME = "edge-phi3 calibration.txt"
"""The dataset's name in matrices made from the packaged text."""

DEFAULT_CHUNK = 512
"""Tokens evaluated together, as in llama-imatrix."""

_SMALLEST_BATCH = 16
"""Products of fewer rows are passed over, as in llama-imatrix."""

_BATCH = 512
_ERROR_LEVEL = 4


class ImatrixError(EdgePhi3Error):
    """An importance matrix that cannot be collected."""


@dataclass(frozen=True, slots=True)
class ImatrixProgress:
    """How far a collection is: `done` of `total` tokens, after `chunk` of `chunks`."""

    done: int
    total: int
    chunk: int
    chunks: int


def calibration_text() -> str:
    """Give the packaged calibration text: conversations in Phi-3's chat format."""
    return files("edge_phi3.conversion").joinpath("data/calibration.txt").read_text("utf-8")


def collect_imatrix(
    model: Path,
    text: str,
    *,
    dataset: str = CALIBRATION_NAME,
    ctx_size: int = DEFAULT_CHUNK,
    chunks: int | None = None,
    from_chunk: int = 0,
    parse_special: bool = True,
    process_output: bool = False,
    earlier: Sequence[Imatrix] = (),
    threads: int | None = None,
    n_gpu_layers: int = -1,
    progress: Callable[[ImatrixProgress], None] | None = None,
    snapshot: Callable[[Imatrix, int], None] | None = None,
) -> Imatrix:
    """Evaluate a text and collect the importance matrix of every weight matrix it passes.

    The text is cut into chunks of `ctx_size` tokens, each evaluated for itself; the rest that fills no chunk is left
    out. A chunk begins with the beginning-of-sequence token when the model adds one.

    Args:
        model: a GGUF of any type; the better its weights, the better the matrix.
        text: what to evaluate.
        dataset: the text's name, recorded in the matrix.
        ctx_size: tokens of a chunk.
        chunks: how many to evaluate at most; None for all.
        from_chunk: how many to skip, those that `earlier` holds.
        parse_special: read ``<|user|>`` as the token and not as the characters.
        process_output: collect for the output matrix too.
        earlier: matrices to go on from.
        threads: CPU threads; by default as many as the process may run on.
        n_gpu_layers: layers kept on the GPU, when there is one; negative for all.
        progress: called before the first and after each chunk; what it raises ends the collection.
        snapshot: called after each chunk with the matrix so far and the number of chunks done, `from_chunk` included.

    Raises:
        ImatrixError: the model cannot be loaded or evaluated, or the text is too short.
        ImatrixFileError: `earlier` is of another model.
    """
    if ctx_size < _SMALLEST_BATCH:
        raise ImatrixError(f"--ctx-size {ctx_size} is too small; give {_SMALLEST_BATCH} tokens at least.")
    with _quiet() as errors, _loaded(model, n_gpu_layers, errors) as handle:
        vocabulary = llama_cpp.llama_model_get_vocab(handle)
        tokens = _tokenize(vocabulary, text, parse_special=parse_special)
        available = len(tokens) // ctx_size - from_chunk
        count = available if chunks is None else min(chunks, available)
        if count < 1:
            raise ImatrixError(
                f"The text has {len(tokens)} tokens, and {from_chunk + 1} chunks of {ctx_size} are needed at least;"
                " give a longer text or a smaller --ctx-size."
            )
        bos = llama_cpp.llama_vocab_bos(vocabulary) if llama_cpp.llama_vocab_get_add_bos(vocabulary) else None
        collector = _Collector(process_output=process_output)

        def result() -> Imatrix:
            seen = Imatrix(collector.entries(), [dataset], 0, ctx_size)
            return merge_imatrices([*earlier, seen], ctx_size)

        with _context(handle, ctx_size, threads or len(os.sched_getaffinity(0)), collector, errors) as context:
            for index in range(count):
                if progress is not None:
                    progress(ImatrixProgress(index * ctx_size, count * ctx_size, index, count))
                start = (from_chunk + index) * ctx_size
                chunk = tokens[start : start + ctx_size].copy()
                if bos is not None:
                    chunk[0] = bos
                _evaluate(context, chunk, collector, errors)
                if snapshot is not None:
                    snapshot(result(), from_chunk + index + 1)
        if progress is not None:
            progress(ImatrixProgress(count * ctx_size, count * ctx_size, count, count))
    return result()


def make_imatrix(
    model: Path,
    output: Path,
    *,
    text: Path | None = None,
    force: bool = False,
    save_every: int | None = None,
    parse_special: bool | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> Imatrix:
    """Collect an importance matrix and write it, whole or not at all.

    Args:
        model: a GGUF.
        output: the file to write, in llama.cpp's GGUF format for importance matrices.
        text: a file of calibration text, UTF-8; None takes the packaged one.
        force: replace `output` when it exists.
        save_every: after so many chunks each, also write what there is so far, as ``NAME-at-CHUNKS.gguf``.
        parse_special: as in `collect_imatrix`; None reads special tokens in the packaged text only, as
            llama-imatrix reads none in a text of a person's own unless told to.
        progress: called before the first and after each chunk, with the bytes of the text that are done, those of the
            whole text, and the number of the chunk.
        options: the other options of `collect_imatrix`.

    Raises:
        ImatrixError, ImatrixFileError: see `collect_imatrix`; `text` cannot be read.
        OutputExistsError: `output` exists and `force` is false.
    """
    if output.exists() and not force:
        raise OutputExistsError(f"{output} exists; give --force to replace it, or another output path.")

    def snapshot(matrix: Imatrix, done: int) -> None:
        if save_every and done % save_every == 0:
            write_imatrix(output.with_name(f"{output.stem}-at-{done}{output.suffix}"), matrix, force=True)

    content = calibration_text() if text is None else _read(text)
    size = len(content.encode())

    def tell(now: ImatrixProgress) -> None:
        if progress is not None:
            progress(size * now.done // now.total, size, f"chunk {now.chunk} of {now.chunks}")

    matrix = collect_imatrix(
        model,
        content,
        dataset=CALIBRATION_NAME if text is None else text.name,
        parse_special=text is None if parse_special is None else parse_special,
        snapshot=snapshot if save_every else None,
        progress=tell,
        **options,
    )
    write_imatrix(output, matrix, force=force)
    return matrix


class _Collector:
    """Sums the squares of activations, called by llama.cpp for each node of its graph."""

    def __init__(self, *, process_output: bool) -> None:
        self.error: BaseException | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._observe)
        self._ggml = Ggml(libggml)
        self._prefixes = ("blk.", "output.weight") if process_output else ("blk.",)
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}

    def entries(self) -> dict[str, ImatrixEntry]:
        """Give what was seen so far, in the order of names."""
        return {
            name: ImatrixEntry(
                self._sums[name].astype(np.float32).reshape(1, -1), np.array([self._counts[name]], np.float32)
            )
            for name in sorted(self._sums)
        }

    def _observe(self, node: int, ask: bool, _user_data: object) -> bool:
        """Answer whether a node is of interest (`ask`), and take it when it has been computed."""
        # An exception cannot pass through llama.cpp: it is kept, and False ends the evaluation.
        try:
            tensor = GgmlTensor.from_address(node)
            if ask:
                return self._wants(tensor)
            self._add(tensor)
        except BaseException as error:  # noqa: BLE001 - raised again by _evaluate
            self.error = error
            return False
        return True

    def _wants(self, tensor: GgmlTensor) -> bool:
        operation = self._ggml.operation(tensor)
        if operation == "MUL_MAT_ID":
            raise ImatrixError("The model is a mixture of experts; Phi-3-mini is not, and only dense models are known.")
        if operation != "MUL_MAT":
            return False
        activations = tensor.src[1].contents
        rows, is_f32 = activations.ne[1], activations.type == llama_cpp.GGML_TYPE_F32
        return rows >= _SMALLEST_BATCH and is_f32 and weight_name(tensor.src[0].contents).startswith(self._prefixes)

    def _add(self, tensor: GgmlTensor) -> None:
        name = weight_name(tensor.src[0].contents)
        values = self._ggml.floats(tensor.src[1].contents)
        rows = values.reshape(-1, values.shape[-1])
        sums = np.einsum("ij,ij->j", rows, rows)
        if not np.isfinite(sums).all():
            raise ImatrixError(f"The activations before {name} are NaN or infinite; convert the checkpoint again.")
        self._sums[name] = self._sums.get(name, np.zeros(sums.size)) + sums
        self._counts[name] = self._counts.get(name, 0) + len(rows)


def _evaluate(context: Any, chunk: NDArray[np.int32], collector: _Collector, errors: list[str]) -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
    try:
        for start in range(0, len(chunk), _BATCH):
            part = chunk[start : start + _BATCH]
            batch.n_tokens = len(part)
            for index, token in enumerate(part):
                # Without logits for all, the last layer's products would see the last token alone.
                batch.token[index], batch.pos[index], batch.logits[index] = int(token), start + index, True
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            status = llama_cpp.llama_decode(context, batch)
            llama_cpp.llama_synchronize(context)
            if collector.error is not None:
                raise collector.error
            if status != 0:
                raise ImatrixError(f"llama.cpp could not evaluate the text: {_last(errors, f'status {status}')}.")
    finally:
        llama_cpp.llama_batch_free(batch)


@contextlib.contextmanager
def _loaded(path: Path, n_gpu_layers: int, errors: list[str]) -> Iterator[Any]:
    if not path.is_file():
        raise ImatrixError(f"{path} is not a file; give the GGUF of a model.")
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers if llama_cpp.llama_supports_gpu_offload() else 0
    # Repacked weights have other kernels, whose rounding differs from machine to machine.
    params.use_extra_bufts = False
    handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not handle:
        why = _last(
            [line for line in errors if not line.endswith("failed to load model")], "it is not a whole GGUF model"
        )
        raise ImatrixError(
            f"There is not enough memory for {path} ({why}); lower --n-gpu-layers."
            if "allocate" in why
            else f"llama.cpp cannot load {path}: {why}."
        )
    try:
        yield handle
    finally:
        llama_cpp.llama_model_free(handle)


@contextlib.contextmanager
def _context(model: Any, cells: int, threads: int, collector: _Collector, errors: list[str]) -> Iterator[Any]:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = cells
    params.n_batch = params.n_ubatch = min(cells, _BATCH)
    params.n_outputs_max = params.n_batch
    params.n_threads = params.n_threads_batch = threads
    params.cb_eval = collector.callback
    params.no_perf = True
    handle = llama_cpp.llama_init_from_model(model, params)
    if not handle:
        why = _last(errors, "it does not say why")
        raise ImatrixError(
            f"llama.cpp cannot make a context of {cells} tokens ({why}); lower --ctx-size or --n-gpu-layers."
        )
    try:
        yield handle
    finally:
        llama_cpp.llama_free(handle)


def _tokenize(vocabulary: Any, text: str, *, parse_special: bool) -> NDArray[np.int32]:
    data = text.encode("utf-8")
    tokens = np.empty(len(data) + 8, np.int32)
    pointer = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), pointer, len(tokens), True, parse_special)
    return tokens[: max(0, count)]


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep llama.cpp's errors in a list and drop the rest of its log, and give the log back afterwards."""
    errors: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama-cpp-python has no types
    def keep(level: int, text: bytes, _user_data: object) -> None:
        if level >= _ERROR_LEVEL:
            errors.append(text.decode("utf-8", "replace").strip())

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(before, data)


def _last(errors: list[str], otherwise: str) -> str:
    return errors[-1].rstrip(".") if errors else otherwise


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ImatrixError(f"The calibration text {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ImatrixError(f"The calibration text {path} is not UTF-8: {error.reason}.") from error
