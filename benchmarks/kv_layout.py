"""What a shared KV cache costs while decoding: cells of finished sequences, and sequence ids that nobody uses.

    python -m benchmarks.kv_layout --models 18m,0.65b --rows 1,16

A unified cache lets sequences share cells, which forks need; in return every row of a batch looks over all cells up to
the highest one in use, and llama.cpp checks every pair of sequence ids in every batch. A cache with a stream for each
sequence, as llama-server has it, does neither. This is why the engine keeps finished (stale) sequences elsewhere. The
variants take turns step by step, so that what slows the machine slows all of them; ratios are medians over the steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.models import CACHE, model_path
from edge_phi3.bench.machine import Machine
from edge_phi3.engine.runtime import Context, Model
from edge_phi3.engine.settings import EngineSettings, usable_cores

_PROMPT = 64
_STALE = 127
"""Tokens of each stale sequence: those of a request of 64 and 64, less the last."""


class Decoding:
    """Sequences that decode side by side in one context.

    Args:
        model: the weights.
        settings: threads and types.
        rows: how many sequences.
        unified: whether all share the cells.
        stale: cells that finished sequences hold.
        sequences: sequence ids of a unified cache.
        steps: tokens that each sequence will decode.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        *,
        rows: int,
        unified: bool,
        stale: int = 0,
        sequences: int = 64,
        steps: int,
    ) -> None:
        self.rows = rows
        self._length = _PROMPT
        self._random = np.random.default_rng(0)
        room = -(-(_PROMPT + steps) // 256) * 256
        cells = rows * room + stale
        self._context = Context(
            model, cells=cells, sequences=sequences if unified else rows, unified=unified, settings=settings
        )
        for number in range(stale // _STALE):
            self._prefill(rows + number % (sequences - rows), number // (sequences - rows) * _STALE, _STALE)
        for row in range(rows):
            self._prefill(row, 0, _PROMPT)

    def _prefill(self, seq_id: int, start: int, count: int) -> None:
        context = self._context
        context.tokens[:count] = self._random.integers(1000, 30000, count)
        context.positions[:count] = np.arange(start, start + count)
        context.seq_ids[:count] = seq_id
        context.wants_logits[:count] = 0
        context.decode(count, 0)

    def step(self) -> float:
        """Decode one token of each sequence; give the seconds it took."""
        context, rows = self._context, self.rows
        context.tokens[:rows] = self._random.integers(1000, 30000, rows)
        context.positions[:rows] = self._length
        context.seq_ids[:rows] = np.arange(rows)
        context.wants_logits[:rows] = 1
        self._length += 1
        started = time.perf_counter()
        context.decode(rows, rows)
        return time.perf_counter() - started

    def close(self) -> None:
        """Free the context."""
        self._context.close()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One variant.

    Attributes:
        model: name of the model.
        rows: sequences that decode side by side.
        variant: how the cache is laid out.
        milliseconds: median of a step.
        ratio: median of a step's time over that of the streams' step beside it.
    """

    model: str
    rows: int
    variant: str
    milliseconds: float
    ratio: float


def measure(name: str, path: Path, rows: int, steps: int, threads: int) -> list[Row]:
    """Measure all variants on one model."""
    model, settings = Model(path), EngineSettings(path, threads=threads)
    variants = {
        "a stream for each": Decoding(model, settings, rows=rows, unified=False, steps=steps),
        "unified": Decoding(model, settings, rows=rows, unified=True, steps=steps),
        "unified, 256 ids": Decoding(model, settings, rows=rows, unified=True, sequences=256, steps=steps),
        "unified, 1,000 stale": Decoding(model, settings, rows=rows, unified=True, stale=1000, steps=steps),
        "unified, 2,000 stale": Decoding(model, settings, rows=rows, unified=True, stale=2000, steps=steps),
        "unified, 5,000 stale": Decoding(model, settings, rows=rows, unified=True, stale=5000, steps=steps),
    }
    taken = np.array([[decoding.step() for decoding in variants.values()] for _ in range(steps)])
    for decoding in variants.values():
        decoding.close()
    model.close()
    return [
        Row(
            model=name,
            rows=rows,
            variant=variant,
            milliseconds=float(np.median(taken[:, i])) * 1e3,
            ratio=float(np.median(taken[:, i] / taken[:, 0])),
        )
        for i, variant in enumerate(variants)
    ]


def main() -> None:
    """Measure, and print a table."""
    words: Callable[[str], Any] = lambda text: text.split(",")  # noqa: E731 - for argparse
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--models", type=words, default=["18m", "0.65b"])
    parser.add_argument("--rows", type=words, default=["1", "16"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    machine, found = Machine.here(), []
    for name in arguments.models:
        for rows in arguments.rows:
            path = model_path(name, arguments.cache)
            found += measure(name, path, int(rows), arguments.steps, arguments.threads)
    table = Table(box=None)
    for heading in ("model", "rows", "KV cache", "ms a step", "over streams"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        table.add_row(row.model, str(row.rows), row.variant, f"{row.milliseconds:.2f}", f"{row.ratio:.3f}")
    print(msgspec.json.encode(machine).decode())
    Console(width=110).print(table)
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode({"machine": machine, "rows": found})))


if __name__ == "__main__":
    main()
