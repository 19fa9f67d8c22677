"""What importance matrices are made of: the squares of the activations before each weight matrix, summed per column.

While llama.cpp evaluates a text, its callback (``cb_eval``) is shown each matrix product.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_phi3 import byte_level
from edge_phi3.llama import ImatrixError
from edge_phi3.llama.backend import reason, supports_gpu_offload
from edge_phi3.llama.ggml import GgmlTensor, check_layout, floats, operation, weight_name
from edge_phi3.llama.model import load_file, tokenize
from edge_phi3.llama.model_file import read_model_file
from edge_phi3.llama.options import ContextOptions
from edge_phi3.llama.proof import prove
from edge_phi3.system_resources import usable_cores

SMALLEST_BATCH = 16
"""Products of fewer rows are passed over, as in llama-imatrix."""

_BATCH = 512


class ActivationCollector:
    """A model that is evaluated on chunks of text, and the sums of what its matrices saw. Made by `collecting`.

    By the name of a weight matrix, `sums` has the squared activations of each column, float64, shape (columns,), and
    `counts` of how many tokens those are.
    """

    def __init__(self, model: Any, unreadable: set[int], *, process_output: bool) -> None:
        check_layout()
        self._model, self._unreadable = model, unreadable
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, int] = {}
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._prefixes = ("blk.", "output.weight") if process_output else ("blk.",)
        self._error: BaseException | None = None
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._observe)

    def tokenize(self, text: str, *, parse_special: bool) -> NDArray[np.int32]:
        """Return the tokens of a text, int32, shape (tokens,), with those that the vocabulary puts around it.

        `ImatrixError`: a byte of the text has no token, of which llama.cpp dies.
        """
        if lacking := {*text.encode()} & self._unreadable:
            raise ImatrixError(f"The model cannot read the text: its vocabulary lacks <0x{min(lacking):02X}>.")
        return tokenize(self._vocabulary, text, add_special=True, parse_special=parse_special)

    def evaluate(self, chunk: NDArray[np.int32]) -> None:
        """Evaluate a chunk by itself in the context, and add what is seen.

        The first token becomes the beginning-of-sequence token if the model adds one.
        """
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        tokens = chunk.tolist()
        if llama_cpp.llama_vocab_get_add_bos(self._vocabulary):
            tokens[0] = llama_cpp.llama_vocab_bos(self._vocabulary)
        batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        try:
            for start in range(0, len(tokens), _BATCH):
                part = tokens[start : start + _BATCH]
                batch.n_tokens = len(part)
                for index, token in enumerate(part):
                    # Without logits for all, the last layer's products would see the last token alone.
                    batch.token[index], batch.pos[index], batch.logits[index] = token, start + index, True
                    batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                status = llama_cpp.llama_decode(self._context, batch)
                llama_cpp.llama_synchronize(self._context)
                if self._error is not None:
                    raise self._error
                if status != 0:
                    raise ImatrixError(f"llama.cpp could not evaluate the text: status {status}{reason()}.")
        finally:
            llama_cpp.llama_batch_free(batch)

    @contextlib.contextmanager
    def context(self, cells: int, threads: int | None) -> Iterator[None]:
        """Make the context in which chunks of at most `cells` tokens are evaluated."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = cells
        params.n_batch = params.n_ubatch = params.n_outputs_max = min(cells, _BATCH)
        params.n_threads = params.n_threads_batch = threads or usable_cores()
        params.cb_eval = self._callback
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ImatrixError(
                f"llama.cpp cannot make a context of {cells} tokens{reason()}; lower --ctx-size or --n-gpu-layers."
            )
        try:
            yield
        finally:
            llama_cpp.llama_free(self._context)

    def _observe(self, node: int, ask: bool, _user_data: object) -> bool:
        """Answer whether a node is of interest (`ask`), and take it when it has been computed."""
        # An exception cannot pass through llama.cpp: it is kept, and False ends the evaluation.
        try:
            tensor = GgmlTensor.from_address(node)
            if ask:
                return self._wants(tensor)
            self._add(tensor)
        except BaseException as error:  # noqa: BLE001 - raised again by evaluate
            self._error = error
            return False
        return True

    def _wants(self, tensor: GgmlTensor) -> bool:
        if operation(tensor.op) == "MUL_MAT_ID":
            raise ImatrixError("The model is a mixture of experts; Phi-3-mini is not, and only dense models are known.")
        if operation(tensor.op) != "MUL_MAT":
            return False
        activations = tensor.src[1].contents
        rows, is_f32 = activations.ne[1], activations.type == llama_cpp.GGML_TYPE_F32
        return rows >= SMALLEST_BATCH and is_f32 and weight_name(tensor.src[0].contents).startswith(self._prefixes)

    def _add(self, tensor: GgmlTensor) -> None:
        name = weight_name(tensor.src[0].contents)
        values = floats(tensor.src[1].contents)
        rows = values.reshape(-1, values.shape[-1])
        sums = np.einsum("ij,ij->j", rows, rows)
        if not np.isfinite(sums).all():
            raise ImatrixError(f"The activations before {name} are NaN or infinite; convert the checkpoint again.")
        self.sums[name] = self.sums.get(name, np.zeros(sums.size)) + sums
        self.counts[name] = self.counts.get(name, 0) + len(rows)


@contextlib.contextmanager
def collecting(path: Path, *, cells: int, process_output: bool, n_gpu_layers: int) -> Iterator[ActivationCollector]:
    """Load a GGUF to collect what its matrices see, with `process_output` the output matrix too.

    `cells` are those of the context that it will have.
    """
    header = read_model_file(path)
    prove(header, [(cells, 1)], ContextOptions())
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = n_gpu_layers if supports_gpu_offload() else 0
    # Repacked weights have other kernels, whose rounding differs from machine to machine.
    params.use_extra_bufts = False
    handle = load_file(header, params)
    try:
        yield ActivationCollector(handle, _unreadable(header.values), process_output=process_output)
    finally:
        llama_cpp.llama_model_free(handle)


def _unreadable(metadata: Mapping[str, Any]) -> set[int]:
    """Return the bytes for which a SentencePiece vocabulary has no token; a byte-level one passes over its own."""
    if metadata["tokenizer.ggml.model"] == byte_level.MODEL:
        return set()
    tokens = {text.replace("▁", " ") for text in metadata["tokenizer.ggml.tokens"]}
    return {byte for byte in range(256) if f"<0x{byte:02X}>" not in tokens and (byte > 127 or chr(byte) not in tokens)}
