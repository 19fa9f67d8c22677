"""The options of a context of llama.cpp."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

KVCacheType = Literal["f32", "f16", "q8_0"]
FlashAttention = Literal["auto", "on", "off"]


class Lora(NamedTuple):
    """A LoRA adapter (GGUF), its strength, and the name that requests choose it by; without one, all have it."""

    path: Path
    scale: float = 1.0
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions:
    """How a context is made.

    `batch_size` counts the tokens of one decode call, `parallel` the sequences whose next tokens are chosen together;
    0 `threads` are the physical cores that this process may use; -1 `n_gpu_layers` are all. Flash attention is
    llama.cpp's choice on "auto", but off for f32 (exactness).
    """

    batch_size: int = 512
    parallel: int = 16
    threads: int = 0
    n_gpu_layers: int = -1
    kv_cache_type: KVCacheType = "f16"
    flash_attn: FlashAttention = "auto"
