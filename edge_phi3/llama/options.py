"""The options of a context of llama.cpp."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

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


def usable_cores() -> int:
    """Return the physical cores that this process may use: hyper-threads, CPU affinity and cgroup quota considered."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
