"""llama.cpp by itself on converted models: tokens, logits and ends of generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model, load_file, tokenize
from edge_phi3.llama.options import ContextOptions


class Vocabulary:
    """The vocabulary of a GGUF that `loaded` has opened."""

    def __init__(self, model: Any) -> None:
        self.handle = llama_cpp.llama_model_get_vocab(model)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """What llama.cpp by itself makes of a text with special tokens."""
        tokens: list[int] = tokenize(self.handle, text, add_special=add_special, parse_special=True).tolist()
        return tokens

    def ends(self) -> list[int]:
        """The tokens that llama.cpp ends a generation on."""
        count = llama_cpp.llama_vocab_n_tokens(self.handle)
        return [token for token in range(count) if llama_cpp.llama_vocab_is_eog(self.handle, token)]


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[Any]:
    """Load the vocabulary of a GGUF."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = load_file(path, params)
    yield model
    llama_cpp.llama_model_free(model)


def logits(model: Model, prompt: list[int], *, context_length: int, last: int) -> NDArray[np.float32]:
    """Return the logits of a prompt's last positions, shape (last, vocabulary): float32 cache, no flash attention."""
    settings = ContextOptions(batch_size=context_length, threads=2, n_gpu_layers=0, kv_cache_type="f32")
    context = Context(model, cells=context_length, sequences=1, settings=settings)
    count = len(prompt)
    context.tokens[:count], context.positions[:count] = prompt, np.arange(count)
    context.wants_logits[:count] = np.arange(count) >= count - last
    found = context.decode(count, last).copy()
    context.close()
    return found
