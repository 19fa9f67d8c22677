"""What a context of llama.cpp can be told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Protocol

import psutil

KVCacheType = Literal["f32", "f16", "q8_0"]
FlashAttention = Literal["auto", "on", "off"]


class ContextOptions(Protocol):
    """The options of a context; `edge_phi3.engine.settings.EngineSettings` has them, and says what they mean."""

    @property
    def batch_size(self) -> int:
        """How many tokens one decode call takes at most."""

    @property
    def threads(self) -> int:
        """Threads of the CPU backend; 0 takes `usable_cores`."""

    @property
    def n_gpu_layers(self) -> int:
        """Layers kept on the GPU; negative for all."""

    @property
    def kv_cache_type(self) -> KVCacheType:
        """Element type of keys and values."""

    @property
    def flash_attn(self) -> FlashAttention:
        """Flash attention."""


def usable_cores() -> int:
    """Return the physical cores that this process may use: hyper-threads, CPU affinity and cgroup quota considered."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
