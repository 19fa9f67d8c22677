"""How the engine loads and runs a model."""

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
