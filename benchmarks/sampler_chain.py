"""llama.cpp's sampler chain, given the parameters that it shares with transformers."""

import ctypes
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
from numpy.typing import NDArray

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class SamplerChain:
    """A chain in transformers' order: repetition penalty, temperature, top-k, top-p, min-p, typical-p, draw.

    Args:
        size: words of the vocabulary.
        history: tokens so far, which the repetition penalty counts.
        seed: of the draw.
        kwargs: ``generate_kwargs``; other parameters than these six are not looked at.
    """

    def __init__(self, size: int, history: Sequence[int] = (), seed: int = 0, **kwargs: Any) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        samplers: dict[str, tuple[float, Callable[[Any], Any]]] = {
            "repetition_penalty": (
                1,
                lambda x: llama_cpp.llama_sampler_init_penalties(size, len(history), x, 0.0, 0.0),
            ),
            "temperature": (1, llama_cpp.llama_sampler_init_temp),
            "top_k": (0, llama_cpp.llama_sampler_init_top_k),
            "top_p": (1, lambda p: llama_cpp.llama_sampler_init_top_p(p, 1)),
            "min_p": (0, lambda p: llama_cpp.llama_sampler_init_min_p(p, 1)),
            "typical_p": (1, lambda p: llama_cpp.llama_sampler_init_typical(p, 1)),
        }
        for name, (neutral, make) in samplers.items():
            if (kwargs.get(name) or neutral) != neutral:
                llama_cpp.llama_sampler_chain_add(self._chain, make(kwargs[name]))
        llama_cpp.llama_sampler_chain_add(self._chain, llama_cpp.llama_sampler_init_dist(seed))
        for token in history:
            llama_cpp.llama_sampler_accept(self._chain, token)
        self._data = np.zeros(size, dtype=_TOKEN_DATA)
        self._ids = np.arange(size, dtype=np.int32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        llama_cpp.llama_sampler_free(self._chain)

    def draw(self, logits: NDArray[np.float32]) -> int:
        """Return the token that is drawn."""
        return self(logits)[0]

    def __call__(self, logits: NDArray[np.float32]) -> tuple[int, NDArray[np.void]]:
        """Return the token that is drawn, and what is left of the vocabulary: fields id, logit and p."""
        self._data["id"] = self._ids
        self._data["logit"] = logits
        pointer = self._data.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        array = llama_cpp.llama_token_data_array(pointer, len(self._data), -1, False)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        left = self._data[: array.size]
        return int(left["id"][array.selected]), left
