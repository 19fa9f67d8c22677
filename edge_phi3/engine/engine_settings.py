"""How the engine loads and runs a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_phi3.llama.options import ContextOptions


@dataclass(frozen=True, slots=True)
class EngineSettings(ContextOptions):
    """The engine's options, those of its contexts included.

    Attributes:
        model_path: the GGUF file.
        ctx_size: KV cells, shared by all sequences; 0 takes the model's own context, at most `DEFAULT_CTX_SIZE`. A
            model with two sets of rotary factors has a second context beside them: see
            `edge_phi3.engine.contexts.context_shapes`.
        parallel: how many sequences are decoded together at most.
        window_chunk: how many tokens of a prompt are fed at a time beyond the sliding window; 1 is exact.
        lora: LoRA adapters and their scales.
        stream_interval: seconds that a streamed token may wait for those after it, to be delivered with them; a first
            token does not wait, and 0 delivers each by itself.
        max_queue: how many requests may wait.
        exact_seeds: whether a request with a seed has a cleared context to itself. Its answer then repeats to the bit,
            and the others wait; without it, its draws repeat, and its logits to rounding.
        prefix_cache: whether finished sequences are kept for later prompts.
        prefix_cache_mib: MiB of main memory that they may take; 0 takes a share of what is free when the model loads.
        stall_timeout: seconds without a step, while requests run, after which the engine is stalled; 0 for never.
        exit_on_stall: whether the process exits with 1 when the engine stays stalled for the same time again.
    """

    model_path: Path
    ctx_size: int = 0
    parallel: int = 16
    window_chunk: int = 32
    lora: tuple[tuple[Path, float], ...] = ()
    stream_interval: float = 0.1
    max_queue: int = 256
    prefix_cache: bool = True
    prefix_cache_mib: int = 0
    exact_seeds: bool = False
    stall_timeout: float = 60.0
    exit_on_stall: bool = True


DEFAULT_CTX_SIZE = 8192
"""KV cells of a model whose own context is longer, unless asked otherwise: 3 GiB at F16 for Phi-3-mini."""
