"""What the engine tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and gauges of an engine, as of now.

    Attributes:
        waiting: requests in the queue.
        running: requests being decoded.
        sequences: llama.cpp sequences of the running requests.
        cells_used: KV cells that hold a token, without those of requests that run alone.
        cells_total: KV cells that requests share.
        stored_tokens: tokens of finished sequences whose keys and values are kept in main memory for later prompts.
        stored_bytes: the memory that they take.
        prompt_tokens_total: tokens of all prompts admitted.
        cached_tokens_total: those of them found in the prefix cache.
        generated_tokens_total: tokens generated.
        preemptions_total: how often a request was sent back to the queue for want of cells.
        steps_total: decode calls.
    """

    waiting: int
    running: int
    sequences: int
    cells_used: int
    cells_total: int
    stored_tokens: int
    stored_bytes: int
    prompt_tokens_total: int
    cached_tokens_total: int
    generated_tokens_total: int
    preemptions_total: int
    steps_total: int
