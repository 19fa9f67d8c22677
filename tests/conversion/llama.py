"""llama.cpp on converted models: tokens, logits and ends of generation, through its C API."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray


@llama_cpp.llama_log_callback
def _silence(level: int, text: bytes, data: object) -> None:
    pass


class Vocabulary:
    """The vocabulary of a loaded GGUF."""

    def __init__(self, model: llama_cpp.llama_model_p) -> None:
        self.handle = llama_cpp.llama_model_get_vocab(model)

    def tokenize(self, text: str, *, special: bool = True, add_special: bool = False) -> list[int]:
        """What llama.cpp by itself makes of a text."""
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.handle, data, len(data), tokens, len(tokens), add_special, special)
        assert count >= 0
        return list(tokens[:count])

    def ends(self) -> list[int]:
        """The tokens that llama.cpp ends a generation on."""
        return [i for i in range(len(self)) if llama_cpp.llama_vocab_is_eog(self.handle, i)]

    def __len__(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self.handle))


@contextlib.contextmanager
def loaded(path: Path, *, vocab_only: bool = False) -> Iterator[llama_cpp.llama_model_p]:
    """Load a GGUF on the CPU."""
    llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp cannot load {path}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def logits(model: llama_cpp.llama_model_p, prompt: list[int], *, context_length: int, last: int) -> NDArray[np.float32]:
    """Give the logits of a prompt's last positions, shape (last, vocabulary): float32 cache, no flash attention."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context_length
    params.n_batch = params.n_ubatch = context_length
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_threads = params.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(prompt), 0, 1)
    try:
        batch.n_tokens = len(prompt)
        for i, token in enumerate(prompt):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i >= len(prompt) - last
        assert llama_cpp.llama_decode(context, batch) == 0
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (last, vocabulary)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
