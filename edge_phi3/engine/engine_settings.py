"""How the engine loads and runs a model, and which contexts of llama.cpp it is served with."""

from dataclasses import dataclass
from pathlib import Path

from edge_phi3.llama.options import ContextOptions, Lora


@dataclass(frozen=True, slots=True)
class EngineSettings(ContextOptions):
    """The engine's options: but for the path of the GGUF file, those of the same names of `edge_phi3.settings`.

    `window_chunk`, `kv_cache_type` and `exact_seeds` decide how exact answers are; the defaults favour speed.
    """

    model_path: Path
    ctx_size: int = 0
    mmap: bool = True
    require_gpu: bool = False
    window_chunk: int = 32
    lora: tuple[Lora, ...] = ()
    stream_interval: float = 0.1
    max_queue: int = 256
    prefix_cache: bool = True
    prefix_cache_mib: int = 0
    exact_seeds: bool = False
    speculation: str = "auto"
    stall_timeout: float = 60.0
    exit_on_stall: bool = True

    @property
    def adapters(self) -> list[str]:
        """The names that requests choose adapters by; the number of one is its place, from 1."""
        return [lora.name for lora in self.lora if lora.name]


DEFAULT_CTX_SIZE = 8192
"""KV cells of a model whose own context is longer, unless `ctx_size` is set: 3 GiB at F16 for Phi-3-mini."""
MAX_PARALLEL = 255
"""Sequences that one llama.cpp context decodes together at most: it has 256 ids (LLAMA_MAX_SEQ), one is kept back."""
_KEPT_SEQUENCES = 64
"""Finished sequences that stay on a GPU at most, beside those that run."""
_GRAIN = 256
"""llama.cpp makes the cells of a context a multiple of this."""


@dataclass(frozen=True, slots=True)
class ContextShape:
    """KV cells and sequence ids of one context; `max_tokens` is how long a sequence may get, None for all cells."""

    cells: int
    sequences: int
    max_tokens: int | None


def context_shapes(
    settings: EngineSettings, context_length: int, original: int | None, *, gpu: bool
) -> list[ContextShape]:
    """Return the contexts to make: one, or for a model with two sets of rotary factors up to two.

    The first of two takes sequences up to the `original` context, beyond which the long factors hold, the second, of
    ``--ctx-size`` cells, the longer ones. The first has half as many cells, but room for at least one and at most
    ``--parallel`` whole sequences. On a `gpu` finished sequences stay in the cells, and so need ids of their own.
    """
    parallel = min(settings.parallel, MAX_PARALLEL)
    ids = parallel
    if gpu:
        ids = min(parallel + _KEPT_SEQUENCES, MAX_PARALLEL, max(parallel, settings.batch_size - 1))
    cells = _rounded(settings.ctx_size or min(context_length, DEFAULT_CTX_SIZE))
    if original is None:
        return [ContextShape(cells, ids, None)]
    if (settings.ctx_size or context_length) <= original:
        return [ContextShape(cells, ids, original)]
    short = _rounded(min(max(original, cells // 2), parallel * original))
    # llama.cpp takes the long factors in a context that is larger than the short one.
    return [ContextShape(short, ids, original), ContextShape(max(cells, short + _GRAIN), ids, None)]


def _rounded(cells: int) -> int:
    return -(-cells // _GRAIN) * _GRAIN
