"""Counters, gauges and times of the engine."""

import bisect
from dataclasses import dataclass, field

from edge_phi3.engine.sequence import FinishedEvent


class Times:
    """Durations in seconds, and their `total`. One thread adds, any may read.

    `counts` are those at or below each of `BOUNDS`, but above the one before; then those beyond.
    """

    BOUNDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0, 30.0)

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.total += seconds


@dataclass(slots=True)
class Totals:
    """Tokens: of all prompts accepted, those of them found in the prefix cache, and what finished requests generated.

    Of what was drafted for these, `accepted` tokens are what the model chose.
    """

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, event: FinishedEvent) -> FinishedEvent:
        """Count what a request generated, and return its last event."""
        self.generated += event.generated_tokens
        self.drafted += event.drafted_tokens
        self.accepted += event.accepted_tokens
        return event


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and gauges of an engine, as of now; `edge_phi3.api.metrics` says what each counts.

    `stored_tokens` and `stored_bytes` are what finished sequences take in main memory, for later prompts. The layers
    are the model's, its output counted as one of them.
    """

    waiting: int = 0
    running: int = 0
    sequences: int = 0
    cells_used: int = 0
    cells_total: int = 0
    stored_tokens: int = 0
    stored_bytes: int = 0
    totals: Totals = field(default_factory=Totals)
    preemptions_total: int = 0
    steps_total: int = 0
    gpu_layers: int = 0
    cpu_layers: int = 0
    device_times: Times = field(default_factory=Times)
    host_times: Times = field(default_factory=Times)
