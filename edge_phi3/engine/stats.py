"""Counters and gauges of the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and gauges of an engine, as of now; `edge_phi3.api.metrics` says what each counts.

    `cells_used` and `cells_total` are KV cells; `stored_tokens` and `stored_bytes` are what finished sequences take in
    main memory, for later prompts.
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
