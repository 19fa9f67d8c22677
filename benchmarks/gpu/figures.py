"""From the steps' records to figures: medians over the turns, and shares of the memory's limit."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import msgspec

from benchmarks.gpu.steps import Record


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of one type at one number of clients, over all turns.

    Attributes:
        kind: type of the weights.
        mode: "greedy" or "sampled".
        clients: users of the closed loop.
        ours: median.
        theirs: llama-server's median, or None.
        ratio: median of the turns' ratios, or None.
        low: the smallest of them.
        high: the largest.
        batched_bench: llama-batched-bench's, prompts included as in ours; None where it was not measured.
        share: of the tokens per second that the memory's bandwidth allows; None where that was not measured.
    """

    kind: str
    mode: str
    clients: int
    ours: float
    theirs: float | None
    ratio: float | None
    low: float | None
    high: float | None
    batched_bench: float | None
    share: float | None


def throughput(records: Mapping[str, Record]) -> list[Throughput]:
    """Give the figures of all turns that are done, in the order in which they were first measured."""
    turns: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    traffic: dict[str, dict[str, int]] = {}
    tokens = 0
    for name, record in records.items():
        if name.startswith("speed.throughput.") and record.done:
            kind, tokens = record.result["kind"], record.result["tokens"]
            traffic[kind] = record.result["traffic"]
            for level in record.result["levels"]:
                turns.setdefault((kind, level["mode"], level["clients"]), []).append(level)
    bandwidth = _result(records, "speed.bandwidth")
    limit = max(bandwidth["read"] or 0.0, bandwidth["copy"]) if bandwidth else None
    found = []
    for (kind, mode, clients), levels in turns.items():
        ours = statistics.median(level["ours"] for level in levels)
        ratios = [level["ratio"] for level in levels if level["ratio"] is not None]
        theirs = [level["theirs"] for level in levels if level["theirs"] is not None]
        share = None
        if limit is not None:
            # A step reads all weights once and each sequence's cache: its prompt and half of its answer on average.
            step = traffic[kind]["weights"] + clients * traffic[kind]["kv_per_token"] * 1.5 * tokens
            share = ours / clients * step / limit
        found.append(
            Throughput(
                kind=kind,
                mode=mode,
                clients=clients,
                ours=ours,
                theirs=statistics.median(theirs) if theirs else None,
                ratio=statistics.median(ratios) if ratios else None,
                low=min(ratios, default=None),
                high=max(ratios, default=None),
                batched_bench=_batched_bench(records, kind, clients),
                share=share,
            )
        )
    return found


def _batched_bench(records: Mapping[str, Record], kind: str, clients: int) -> float | None:
    found = _result(records, f"speed.batched-bench.{kind}")
    levels = found["levels"] if found else []
    # Its last column counts prompt tokens as well, which are as many as the generated ones.
    return next((level["both"] / 2 for level in levels if level["clients"] == clients), None)


def _result(records: Mapping[str, Record], name: str) -> Any:
    record = records.get(name)
    return record.result if record is not None and record.done else None
