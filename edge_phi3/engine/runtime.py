"""llama.cpp, as the engine sees it: a model, its vocabulary, and contexts that decode batches.

The only file of the service that calls ``llama_cpp``. Arrays that cross the border are NumPy views of llama.cpp's own
memory, or memory of ours that llama.cpp reads; nothing is copied token by token.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import logging
import weakref
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.errors import DecodeFailedError, GrammarError, ModelLoadError
from edge_phi3.engine.settings import (
    EngineSettings,
    FlashAttention,
    KVCacheType,
    usable_cores,
)

logger = logging.getLogger(__name__)

_KV_TYPES = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
_FLASH_ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_ERROR_LEVEL = 4
_errors: collections.deque[str] = collections.deque(maxlen=1)
_EXPECTED_WARNINGS = (
    "Phi SWA is currently disabled",  # the engine keeps the window itself
    "control-looking token",  # </s> is an ordinary token in Phi-3's tokenizer_config.json
    "special_eom_id is not in special_eog_ids",  # the engine knows the model's end tokens
)
_LOG_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}


def _log_to_python(level: int, text: bytes, _user_data: object) -> None:
    """Pass llama.cpp's own lines to the log of this module, its chatter as debug."""
    line = text.decode(errors="replace").strip()
    if level >= _ERROR_LEVEL:
        _errors.append(line)
    if line.strip("."):
        expected = any(part in line for part in _EXPECTED_WARNINGS)
        logger.log(logging.DEBUG if expected else _LOG_LEVELS.get(level, logging.DEBUG), "%s", line)


_LOG_CALLBACK = llama_cpp.llama_log_callback(_log_to_python)


def _reason() -> str:
    """Give llama.cpp's own last complaint, as the end of a sentence."""
    return f" ({_errors.pop()})" if _errors else ""


@functools.cache
def _start_backends() -> None:
    llama_cpp.llama_backend_init()


def initialise_backend() -> None:
    """Start llama.cpp's backends, once a process, and take over its log from whoever had it."""
    llama_cpp.llama_log_set(_LOG_CALLBACK, ctypes.c_void_p(0))
    _start_backends()


def supports_gpu_offload() -> bool:
    """Whether this build of llama.cpp can keep layers on a GPU."""
    initialise_backend()  # backends that are libraries of their own are not known before
    return bool(llama_cpp.llama_supports_gpu_offload())


class Model:
    """A Phi-3 GGUF file in memory: weights, vocabulary and metadata.

    The vocabulary functions are read-only and may be called from any thread.

    Args:
        path: the GGUF file.
        n_gpu_layers: layers kept on the GPU; negative for all.

    Raises:
        ModelLoadError: the file is missing, is not a GGUF, is damaged, or is no Phi-3 with Phi-3's vocabulary.
    """

    def __init__(self, path: Path, *, n_gpu_layers: int = -1) -> None:
        initialise_backend()
        if not path.is_file():
            raise ModelLoadError(f"There is no model file {path}.")
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self.path = path
        self._handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._handle:
            raise ModelLoadError(
                f"llama.cpp cannot load {path}: it is not a whole GGUF model that this build knows{_reason()}."
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._handle)
        self._adapters: list[tuple[Any, float]] = []
        architecture = self.metadata("general.architecture")
        if architecture != "phi3":
            self.close()
            raise ModelLoadError(f"{path} is a model of architecture {architecture!r}; edge-phi3 serves 'phi3' only.")
        if self.metadata("tokenizer.ggml.model") != "llama":
            kind = self.metadata("tokenizer.ggml.model")
            self.close()
            raise ModelLoadError(
                f"{path} has a {kind!r} vocabulary (Phi-4?); edge-phi3 serves Phi-3's SentencePiece one."
            )
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.context_length = int(llama_cpp.llama_model_n_ctx_train(self._handle))
        self.layers = int(llama_cpp.llama_model_n_layer(self._handle))
        # Phi-3's tokenizers put no <s> in front; many GGUFs from elsewhere claim that they do. Ours say what the
        # checkpoint says.
        converted_here = self.metadata("edge_phi3.generation.config") is not None
        self.adds_bos = converted_here and bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    def metadata(self, key: str) -> str | None:
        """Give the text of a metadata value that is not an array, or None when the file has none."""
        size = llama_cpp.llama_model_meta_val_str(self._handle, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        llama_cpp.llama_model_meta_val_str(self._handle, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    @property
    def description(self) -> str:
        """Architecture, number of weights and llama.cpp's name of the file type: ``phi3 3.82 B Q4_K - Medium``."""
        file_type = llama_cpp.llama_ftype_name(llama_cpp.llama_model_ftype(self._handle)).decode()
        count = self.parameters
        size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        return f"phi3 {size} {file_type}"

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        return int(llama_cpp.llama_model_n_params(self._handle))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return int(llama_cpp.llama_model_size(self._handle))

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template of the file, or None."""
        template = llama_cpp.llama_model_chat_template(self._handle, None)
        return template.decode(errors="replace") if template else None

    @property
    def bos_token_id(self) -> int:
        """The beginning-of-sequence token."""
        return int(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos_token_id(self) -> int:
        """The one end-of-sequence token that GGUF names."""
        return int(llama_cpp.llama_vocab_eos(self._vocab))

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token as llama.cpp stores them: ``▁`` for a space, ``<0x0A>`` for a byte."""
        return [llama_cpp.llama_vocab_get_text(self._vocab, token) or b"" for token in range(self.vocab_size)]

    @functools.cached_property
    def attributes(self) -> NDArray[np.int32]:
        """The `llama_token_attr` bits of every token, shape ``(vocab_size,)``."""
        get = llama_cpp.llama_vocab_get_attr
        return np.fromiter((get(self._vocab, token) for token in range(self.vocab_size)), np.int32, self.vocab_size)

    def tokenize(self, text: str) -> NDArray[np.int32]:
        """Encode a text that holds no special token, or whose special tokens are meant as the characters they are.

        Returns:
            Token ids, int32, shape ``(tokens,)``.
        """
        data = text.encode("utf-8", errors="replace")
        count = -(len(data) + 8)
        while count < 0:
            tokens = np.empty(-count, np.int32)
            pointer = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), pointer, len(tokens), False, False)
        return tokens[:count].copy()

    def grammar(self, text: str) -> Grammar:
        """Parse a grammar in llama.cpp's language, GBNF; its start symbol is ``root``. From any thread.

        Raises:
            GrammarError: it is no grammar, is recursive on its left, or repeats more than llama.cpp allows.
        """
        handle = llama_cpp.llama_sampler_init_grammar(self._vocab, text.encode(), b"root")
        if not handle:
            raise GrammarError(f"llama.cpp cannot use the grammar{_reason()}.")
        return Grammar(handle)

    def load_lora(self, path: Path, scale: float) -> None:
        """Load a LoRA adapter; contexts made afterwards apply it, scaled by `scale`.

        Raises:
            ModelLoadError: the file is missing, or no adapter for this model.
        """
        adapter = llama_cpp.llama_adapter_lora_init(self._handle, str(path).encode()) if path.is_file() else None
        if not adapter:
            raise ModelLoadError(f"{path} is not a LoRA adapter (GGUF) for {self.path.name}.")
        self._adapters.append((adapter, scale))

    def close(self) -> None:
        """Free the model. Contexts made from it must be closed before."""
        if self._handle:
            llama_cpp.llama_model_free(self._handle)
            self._handle = None


class Context:
    """A llama.cpp context: the KV cache of many sequences, and the decode call.

    Args:
        model: the weights.
        cells: KV cells in all.
        sequences: how many sequence ids there are.
        unified: one cache that all sequences share, or one part of ``cells / sequences`` for each.
        settings: batch size, threads, element types.

    Attributes:
        offloaded: whether the KV cache lies on a GPU.
        saves: whether `save` and `restore` are fast enough to be of use.
        scratch: a sequence id beyond the others, empty between calls; only a unified cache has it.

    Raises:
        ModelLoadError: llama.cpp cannot make the context, for want of memory most often.
    """

    def __init__(self, model: Model, *, cells: int, sequences: int, unified: bool, settings: EngineSettings) -> None:
        params = context_parameters(cells=cells, sequences=sequences, unified=unified, settings=settings)
        # llama.cpp asks between graph nodes whether to stop. A Python callback would take the interpreter lock each
        # time: strlen() of a flag that is "" or "\1" is the same question asked in C.
        self._abort_flag = ctypes.create_string_buffer(2)
        params.abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
        params.abort_callback_data = ctypes.cast(self._abort_flag, ctypes.c_void_p)
        self._params = params
        self._handle = llama_cpp.llama_init_from_model(model._handle, params)  # noqa: SLF001 - the pair is one unit
        if not self._handle:
            raise ModelLoadError(
                f"llama.cpp cannot make a context of {cells} KV cells of type {settings.kv_cache_type}{_reason()}. "
                "Lower --ctx-size, or choose another --kv-cache-type."
            )
        self._model = model
        self._memory = llama_cpp.llama_get_memory(self._handle)
        self._apply_adapters()
        self.unified = unified
        self.cells = int(llama_cpp.llama_n_ctx(self._handle))
        self.cells_per_sequence = int(llama_cpp.llama_n_ctx_seq(self._handle))
        self.sequences = self.scratch = sequences
        self.offloaded = settings.n_gpu_layers != 0 and supports_gpu_offload()
        # Without flash attention the values are stored column by column: a GPU would copy each number by itself.
        self.saves = not self.offloaded or _flash_attention(settings.flash_attn, settings.kv_cache_type) != "off"
        self.batch_size = settings.batch_size
        self._allocate_batch(settings.batch_size)
        self._views: dict[tuple[int, int], NDArray[np.float32]] = {}
        """Views of the logits by address and rows: to make one takes longer than to choose a token from it."""

    def _apply_adapters(self) -> None:
        adapters = self._model._adapters  # noqa: SLF001 - the pair is one unit
        if adapters:
            handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*(handle for handle, _ in adapters))
            scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
            if llama_cpp.llama_set_adapters_lora(self._handle, handles, len(adapters), scales) != 0:
                raise ModelLoadError("llama.cpp cannot apply the LoRA adapters to this model.")

    def _allocate_batch(self, size: int) -> None:
        self.tokens = np.zeros(size, np.int32)
        self.positions = np.zeros(size, np.int32)
        self.seq_ids = np.zeros(size, np.int32)
        self.wants_logits = np.zeros(size, np.int8)
        self._one = np.ones(size, np.int32)
        addresses = self.seq_ids.ctypes.data + 4 * np.arange(size, dtype=np.uintp)
        self._seq_id_pointers = np.ascontiguousarray(addresses, np.uintp)
        int32_p = ctypes.POINTER(ctypes.c_int32)
        self._batch = llama_cpp.llama_batch(
            n_tokens=0,
            token=self.tokens.ctypes.data_as(int32_p),
            embd=None,
            pos=self.positions.ctypes.data_as(int32_p),
            n_seq_id=self._one.ctypes.data_as(int32_p),
            seq_id=self._seq_id_pointers.ctypes.data_as(ctypes.POINTER(int32_p)),
            logits=self.wants_logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def decode(self, count: int) -> NDArray[np.float32]:
        """Decode the first `count` tokens of `tokens`, `positions`, `seq_ids` and `wants_logits`.

        Returns:
            Logits of the tokens that asked for them, in batch order: float32, shape ``(rows, vocab_size)``, a writable
            view of llama.cpp's memory that the next call overwrites.

        Raises:
            DecodeFailedError: llama.cpp failed, was aborted, or found no free cells.
        """
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._handle, self._batch)
        if status != 0:
            reason = {1: "found no free KV cells", 2: "was told to stop"}.get(status, f"failed with status {status}")
            raise DecodeFailedError(f"llama.cpp {reason} while decoding a batch of {count} tokens.")
        rows = int(np.count_nonzero(self.wants_logits[:count]))
        if rows == 0:
            return np.empty((0, self._model.vocab_size), np.float32)
        address = ctypes.addressof(llama_cpp.llama_get_logits(self._handle).contents)
        view = self._views.get((address, rows))
        if view is None:
            view = np.ctypeslib.as_array(
                ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape=(rows, self._model.vocab_size)
            )
            self._views[address, rows] = view
        return view

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold all cells of `source`: shared in a unified cache, copied otherwise."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def remove(self, seq_id: int, start: int, end: int) -> None:
        """Take positions ``[start, end)`` from a sequence; -1 leaves that side open."""
        llama_cpp.llama_memory_seq_rm(self._memory, seq_id, start, end)

    def position_range(self, seq_id: int) -> tuple[int, int]:
        """Give the smallest and the largest position that llama.cpp holds for a sequence, or (-1, -1)."""
        memory = self._memory
        return (
            int(llama_cpp.llama_memory_seq_pos_min(memory, seq_id)),
            int(llama_cpp.llama_memory_seq_pos_max(memory, seq_id)),
        )

    def save(self, seq_id: int, start: int, end: int) -> NDArray[np.uint8]:
        """Give the keys and values of the positions ``[start, end)`` of a sequence, as llama.cpp writes them.

        Returns:
            A copy in main memory, shape ``(bytes,)``.
        """
        source = seq_id
        if self.position_range(seq_id) != (start, end - 1):
            source = self.scratch
            llama_cpp.llama_memory_seq_cp(self._memory, seq_id, source, start, end)
        state = np.empty(llama_cpp.llama_state_seq_get_size(self._handle, source), np.uint8)
        llama_cpp.llama_state_seq_get_data(self._handle, _bytes_pointer(state), len(state), source)
        if source != seq_id:
            self.remove(source, -1, -1)
        return state

    def restore(self, seq_id: int, state: NDArray[np.uint8], *, behind: bool) -> bool:
        """Put what `save` gave into a sequence: as its beginning, or behind what it holds.

        Returns:
            False when llama.cpp could not, for want of cells most often.
        """
        target = self.scratch if behind else seq_id
        read = llama_cpp.llama_state_seq_set_data(self._handle, _bytes_pointer(state), len(state), target)
        if behind:
            llama_cpp.llama_memory_seq_cp(self._memory, target, seq_id, -1, -1)
            self.remove(target, -1, -1)
        return int(read) == len(state)

    def state_size(self) -> int:
        """Give the bytes that llama.cpp would save for all sequences: grows with the cells in use."""
        return int(llama_cpp.llama_state_get_size(self._handle))

    def clear(self, *, zero: bool = False) -> None:
        """Empty the KV cache; with `zero` also overwrite it, as after a failure that may have left NaN there."""
        llama_cpp.llama_memory_clear(self._memory, zero)

    def abort(self) -> None:
        """Make the running decode call, and any later one, fail at the next graph node. From any thread."""
        self._abort_flag[0] = b"\1"

    @property
    def closed(self) -> bool:
        """Whether it has been freed."""
        return not self._handle

    def warm_up(self) -> None:
        """Decode one token, so that the first request does not pay for lazy set-up."""
        self.decode_anything(1)

    def decode_anything(self, count: int) -> None:
        """Decode the first token of `count` sequences, and forget them all."""
        self.tokens[:count] = max(self._model.bos_token_id, 0)
        self.positions[:count] = 0
        self.seq_ids[:count] = np.arange(count)
        self.wants_logits[:count] = 1
        self.decode(count)
        self.clear()

    def close(self) -> None:
        """Free the context."""
        if self._handle:
            llama_cpp.llama_free(self._handle)
            self._handle = None


def _bytes_pointer(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data`."""


class Grammar:
    """A state of a grammar: what may still come. Freed with its last reference. Made by `Model.grammar`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        weakref.finalize(self, llama_cpp.llama_sampler_free, handle)

    def apply(self, candidates: NDArray[np.void]) -> None:
        """Give candidates that cannot come next the logit minus infinity; their order stays.

        Args:
            candidates: of the type `CANDIDATE`, shape (n,).
        """
        data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(data, len(candidates), -1, False)
        llama_cpp.llama_sampler_apply(self._handle, ctypes.byref(array))

    def accept(self, token: int) -> None:
        """Go on with a token that `apply` lets come next. With any other, llama.cpp ends the process."""
        llama_cpp.llama_sampler_accept(self._handle, token)

    def clone(self) -> Grammar:
        """Give a copy of the state."""
        return Grammar(llama_cpp.llama_sampler_clone(self._handle))


def context_parameters(*, cells: int, sequences: int, unified: bool, settings: EngineSettings) -> Any:
    """Give the ``llama_context_params`` of a `Context`, all that decides on its memory."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = cells
    params.n_batch = params.n_ubatch = settings.batch_size
    params.n_seq_max = sequences + 1 if unified else sequences
    params.n_outputs_max = max(settings.batch_size, sequences)
    params.n_threads = params.n_threads_batch = settings.threads or usable_cores()
    params.type_k = params.type_v = _KV_TYPES[settings.kv_cache_type]
    params.flash_attn_type = _FLASH_ATTENTION[_flash_attention(settings.flash_attn, settings.kv_cache_type)]
    params.kv_unified = unified
    params.no_perf = True
    return params


def _flash_attention(wanted: FlashAttention, kv_cache_type: KVCacheType) -> FlashAttention:
    if wanted == "auto" and kv_cache_type == "f32":
        return "off"
    return wanted
