"""Contexts: the KV cache of many sequences, and the decode call."""

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_phi3.llama import DecodeFailedError, ModelLoadError
from edge_phi3.llama.backend import reason, supports_gpu_offload
from edge_phi3.llama.model import Model
from edge_phi3.llama.options import ContextOptions, FlashAttention, KVCacheType
from edge_phi3.system_resources import usable_cores

_SCORED = 64
"""Tokens of prompts whose logits may be wanted in one decode call, beside the rows that choose."""

_KV_TYPES = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
_logits_address = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
    ctypes.cast(llama_cpp.llama_get_logits, ctypes.c_void_p).value or 0
)
"""llama_get_logits, without a new pointer object for each call."""
_FLASH_ATTENTION = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


class Context:
    """A llama.cpp context: a KV cache that sequences share, and the decode call.

    Attributes:
        cells: KV cells, for `sequences` sequence ids from 0 on.
        batch_size: how many tokens one call of `decode` takes at most.
        outputs: how many of them have logits at most; `scored` of these may be tokens of prompts that are scored.
        tokens: the batch's token ids, int32, shape ``(batch_size,)``, as their `positions` and their `seq_ids`.
        wants_logits: which of them have logits that are wanted, int8.
        offloaded: whether the KV cache lies on a GPU.
        saves: whether `save` and `restore` are fast enough to be of use.
        scratch: a sequence id beyond the others, empty between calls.
        bytes_per_token: what `save` returns for one token; known after `warm_up`.

    Raises:
        ModelLoadError: llama.cpp cannot make the context, for want of memory most often.
    """

    def __init__(
        self, model: Model, *, cells: int, sequences: int, settings: ContextOptions, scored: int = _SCORED
    ) -> None:
        params = context_parameters(cells=cells, sequences=sequences, settings=settings, scored=scored)
        # llama.cpp asks between graph nodes whether to stop. A Python callback would take the interpreter lock each
        # time: strlen() of a flag that is "" or "\1" is the same check in C.
        self._abort_flag = ctypes.create_string_buffer(2)
        params.abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
        params.abort_callback_data = ctypes.cast(self._abort_flag, ctypes.c_void_p)
        self._handle = llama_cpp.llama_init_from_model(model._handle, params)  # noqa: SLF001 - the pair is one unit
        if not self._handle:
            raise ModelLoadError(
                f"llama.cpp cannot make a context of {cells} KV cells of type {settings.kv_cache_type}{reason()}. "
                "Lower --ctx-size, or choose another --kv-cache-type."
            )
        self._model = model
        self._memory = llama_cpp.llama_get_memory(self._handle)
        self.adapt(0)
        self.cells = int(llama_cpp.llama_n_ctx(self._handle))
        self.sequences = self.scratch = sequences
        self.bytes_per_token = 1
        # The output is the first layer to be offloaded; the KV cache goes with the others.
        self.offloaded = settings.n_gpu_layers not in {0, 1} and supports_gpu_offload()
        # Without flash attention the values are stored column by column: a GPU would copy each number by itself.
        self.saves = not self.offloaded or _flash_attention(settings.flash_attn, settings.kv_cache_type) != "off"
        self.batch_size: int = params.n_batch
        self.outputs: int = params.n_outputs_max
        self.scored = scored
        self.tokens, self.positions, self.seq_ids = (np.zeros(self.batch_size, np.int32) for _ in range(3))
        self.wants_logits = np.zeros(self.batch_size, np.int8)
        self._one = np.ones(self.batch_size, np.int32)
        addresses = self.seq_ids.ctypes.data + 4 * np.arange(self.batch_size, dtype=np.uintp)
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
        self._views: dict[tuple[int, int], NDArray[np.float32]] = {}
        """Views of the logits by address and rows: to make one takes longer than to choose a token from it."""

    def adapt(self, number: int) -> None:
        """Apply the adapters of that number to what is decoded from now on, and those of number 0 in any case.

        The next call of `decode` makes llama.cpp reserve its graphs anew, where this changes anything.
        """
        found = [adapter for adapter in self._model._adapters if adapter.number in {0, number}]  # noqa: SLF001 - as above
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * len(found))(*(adapter.handle for adapter in found))
        scales = (ctypes.c_float * len(found))(*(adapter.scale for adapter in found))
        if llama_cpp.llama_set_adapters_lora(self._handle, handles, len(found), scales) != 0:
            raise ModelLoadError("llama.cpp cannot apply the LoRA adapters to this model.")

    def decode(self, count: int, rows: int, beside: Callable[[], None] = lambda: None) -> NDArray[np.float32]:
        """Decode the first `count` tokens of `tokens`, `positions`, `seq_ids` and `wants_logits`.

        `beside` is what Python does meanwhile. On a GPU, llama.cpp returns before the device has computed, and waits
        for it where the logits are read; on a CPU it computes in this thread, and `beside` comes first.

        Return the logits of the first `rows` tokens that ask for them, in batch order: float32, shape ``(rows,
        vocab_size)``, a writable view of llama.cpp's memory that the next call overwrites.

        Raises:
            DecodeFailedError: llama.cpp failed, was aborted, or found no free cells.
        """
        assert rows <= self.outputs, "llama.cpp would end the process"
        self._batch.n_tokens = count
        if not self.offloaded:
            beside()
        status = llama_cpp.llama_decode(self._handle, self._batch)
        if status != 0:
            reason = {1: "found no free KV cells", 2: "was aborted"}.get(status, f"failed with status {status}")
            raise DecodeFailedError(f"llama.cpp {reason} while decoding a batch of {count} tokens.")
        if self.offloaded:
            beside()
        if rows == 0:
            return np.empty((0, self._model.vocab_size), np.float32)
        address = _logits_address(self._handle)
        view = self._views.get((address, rows))
        if view is None:
            view = np.ctypeslib.as_array(
                ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape=(rows, self._model.vocab_size)
            )
            self._views[address, rows] = view
        return view

    def copy(self, source: int, target: int) -> None:
        """Make `target` share all cells of `source`."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def remove(self, seq_id: int, start: int, end: int) -> None:
        """Take positions ``[start, end)`` from a sequence; -1 leaves that side open."""
        llama_cpp.llama_memory_seq_rm(self._memory, seq_id, start, end)

    def position_range(self, seq_id: int) -> tuple[int, int]:
        """Return the smallest and the largest position that llama.cpp holds for a sequence, or (-1, -1)."""
        lowest = llama_cpp.llama_memory_seq_pos_min(self._memory, seq_id)
        return int(lowest), int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq_id))

    def save(self, seq_id: int, start: int, end: int) -> NDArray[np.uint8]:
        """Return a copy of the keys and values of the positions ``[start, end)`` of a sequence, shape (bytes,)."""
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
        """Put what `save` gave into a sequence: as its beginning, or behind what it holds; False without room."""
        target = self.scratch if behind else seq_id
        read = llama_cpp.llama_state_seq_set_data(self._handle, _bytes_pointer(state), len(state), target)
        if behind:
            llama_cpp.llama_memory_seq_cp(self._memory, target, seq_id, -1, -1)
            self.remove(target, -1, -1)
        return int(read) == len(state)

    def clear(self, *, zero: bool = False) -> None:
        """Empty the KV cache; with `zero` also overwrite it, as after a failure that may have left NaN there."""
        llama_cpp.llama_memory_clear(self._memory, zero)

    def abort(self) -> None:
        """Make the running decode call, and any later one, fail at the next graph node. From any thread."""
        self._abort_flag[0] = b"\1"

    def warm_up(self) -> None:
        """Decode one token, so that the first request does not pay for lazy set-up, and forget it."""
        self.tokens[0] = max(self._model.bos_token_id, 0)
        self.positions[0] = self.seq_ids[0] = 0
        self.wants_logits[0] = 1
        self.decode(1, 1)
        self.bytes_per_token = int(llama_cpp.llama_state_seq_get_size(self._handle, 0))
        self.clear()

    def close(self) -> None:
        """Free the context."""
        if self._handle:
            llama_cpp.llama_free(self._handle)
            self._handle = None


def context_parameters(*, cells: int, sequences: int, settings: ContextOptions, scored: int = _SCORED) -> Any:
    """Return the ``llama_context_params`` of a `Context`, all that decides on its memory.

    `scored` tokens of a decode call may have logits beside those that are chosen from.
    """
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = cells
    params.n_seq_max = sequences + 1
    # Each sequence's next token fits one batch; llama.cpp ends the process if there is no room for one output of each.
    params.n_batch = params.n_ubatch = max(settings.batch_size, params.n_seq_max)
    # Logits of a whole batch would take 391 MiB more for 512 tokens of a vocabulary of 200,064.
    params.n_outputs_max = min(params.n_batch, max(settings.parallel + scored, params.n_seq_max))
    params.n_threads = params.n_threads_batch = settings.threads or usable_cores()
    params.type_k = params.type_v = _KV_TYPES[settings.kv_cache_type]
    params.flash_attn_type = _FLASH_ATTENTION[_flash_attention(settings.flash_attn, settings.kv_cache_type)]
    params.kv_unified = True
    params.no_perf = True
    return params


def _flash_attention(wanted: FlashAttention, kv_cache_type: KVCacheType) -> FlashAttention:
    if wanted == "auto" and kv_cache_type == "f32":
        return "off"
    return wanted


def _bytes_pointer(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
