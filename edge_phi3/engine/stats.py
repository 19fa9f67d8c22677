"""Counters and gauges of the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and gauges of an engine, as of now.

    Attributes:
        waiting: requests in the queue.
        running: requests being decoded.
        sequences: llama.cpp sequences of the running requests.
        cells_used: KV cells that hold a token.
        cells_total: KV cells in all.
        stored_tokens: tokens of finished sequences whose keys and values are kept in main memory for later prompts.
        stored_bytes: the memory that they take.
        prompt_tokens_total: tokens of all prompts admitted.
        cached_tokens_total: those of them found in the prefix cache.
        generated_tokens_total: tokens generated.
        preemptions_total: how often a request was sent back to the queue for want of cells.
        steps_total: decode calls.
    """

    waiting: int = 0
    running: int = 0
    sequences: int = 0
    cells_used: int = 0
    cells_total: int = 0
    stored_tokens: int = 0
    stored_bytes: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
