"""What --window-chunk costs and what it changes: prompts of 3,000 tokens on models with a window of 2,047.

    python -m benchmarks.window_chunk                     # quality on the demo model, quality and time on random ones
    python -m benchmarks.window_chunk --models demo --chunks 1,32,128 --prompts 32

Beyond the window a prompt is exact one token at a time. In chunks of N, a token sees up to N - 1 tokens more than it
should: faster, and no longer what transformers computes. For each N this measures the time to the first token and how
far the next-token distributions after the prompt are from those of N = 1: Kullback-Leibler divergence in nats and how
often the most likely token is the same, for the first token and for a forced continuation (the exact greedy one). "all"
is no window at all: what llama.cpp does by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.engine_ratios import public_options
from benchmarks.models import CACHE, model_path
from edge_phi3.bench.machine import Machine
from edge_phi3.engine import loader
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.loader import LoadedModel, load
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import GenerationRequest, RunningRequest
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import Decoder, GenerationResult, Step, Turn, advance
from edge_phi3.generation.history import TokenHistory
from edge_phi3.generation.logits import Scores, log_softmax
from scripts.demo_model.corpus import dice, read_corpus

NO_WINDOW = 0
"""Stands for attention to the whole prompt."""

Tokens = NDArray[np.int32]


class Recorder(Decoder):
    """Continues with given tokens (greedily where there are none), and keeps each distribution on the way."""

    __slots__ = ("chosen", "distributions", "first_logits_at", "forced")

    def __init__(self, prompt: Tokens, count: int, forced: Sequence[int] | None) -> None:
        super().__init__(TokenHistory(prompt))
        self.processors = ()
        self.chooser = _record
        self.forced = forced
        self.chosen: list[int] = []
        self.distributions = np.empty((count, 0), np.float32)
        self.first_logits_at = 0.0

    def record(self, row: Scores) -> Step:
        """Keep the log-probabilities of a row of logits, and choose."""
        if not self.chosen:
            self.first_logits_at = time.perf_counter()
            self.distributions = np.empty((len(self.distributions), len(row)), np.float32)
        at = len(self.chosen)
        self.distributions[at] = row
        log_softmax(self.distributions[at : at + 1])
        self.chosen.append(int(row.argmax()) if self.forced is None else self.forced[at])
        self.history.extend(np.zeros(1, np.intp), np.array(self.chosen[-1:], np.int32))
        self.finished = len(self.chosen) == len(self.distributions)
        return Step((0,), self.chosen[-1:], (0,))

    def result(self) -> GenerationResult:
        """Give the tokens chosen."""
        return GenerationResult(0, [np.array(self.chosen, np.int32)])


def _record(turns: Sequence[Turn], logits: Scores, steps: list[Step]) -> None:
    for turn in turns:
        assert isinstance(turn.decoder, Recorder)
        steps[turn.place] = turn.decoder.record(logits[turn.row])


def feed(loaded: LoadedModel, prompt: Tokens, recorder: Recorder) -> float:
    """Run a prompt and its continuation as the engine's thread does; give the seconds to the first distribution."""
    (runner,) = loaded.runners
    scheduler = Scheduler([runner], parallel=1, share_prefixes=False)
    longest = len(prompt) + len(recorder.distributions)
    config = GenerationConfig.resolve({"max_length": longest}, loaded.defaults)
    running = RunningRequest(GenerationRequest(prompt, config), recorder, lambda _: None, 0, 0.0)
    scheduler.enqueue(running)
    started = time.perf_counter()
    scheduler.admit()
    while not recorder.finished:
        batch = scheduler.plan(runner)
        logits = runner.decode(batch)
        for request, step in zip(batch.choosing, advance([r.decoder for r in batch.choosing], logits), strict=True):
            if not recorder.finished:
                runner.reorder(request, step.parents)
    scheduler.retire(running)
    runner.kv.settle()
    return recorder.first_logits_at - started


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one chunk size on one model.

    Attributes:
        model: name of the model.
        chunk: tokens at a time, or `NO_WINDOW`.
        seconds: median time to the first token.
        speed: prompt tokens per second, from that time.
        first_kl: mean divergence of the first token's distribution from that of chunk 1, in nats.
        first_kl_max: the largest of them.
        kl: mean divergence over the whole continuation.
        kl_p99: the 99th percentile.
        same_top: share of distributions with the same most likely token.
    """

    model: str
    chunk: int
    seconds: float
    speed: float
    first_kl: float
    first_kl_max: float
    kl: float
    kl_p99: float
    same_top: float


@dataclass(slots=True)
class Exact:
    """What chunk 1 gives for each prompt: so many tokens, and their distributions."""

    count: int
    chosen: list[list[int]] = field(default_factory=list)
    distributions: list[NDArray[np.float32]] = field(default_factory=list)


def measure(
    name: str, path: Path, prompts: Sequence[Tokens], chunks: Iterable[int], arguments: argparse.Namespace
) -> list[Row]:
    """Measure every chunk size on one model; chunk 1 comes first, whatever `chunks` says."""
    exact = Exact(arguments.continuation)
    rows = []
    for chunk in [1, *(chunk for chunk in chunks if chunk != 1)]:
        settings = EngineSettings(
            path,
            ctx_size=4096,
            parallel=1,
            threads=arguments.threads,
            window_chunk=chunk or 1,
            kv_cache_type=arguments.kv_cache_type,
            prefix_cache=False,
        )
        windowless = mock.patch.object(loader, "_sliding_window", return_value=None)
        with windowless if chunk == NO_WINDOW else contextlib.nullcontext():
            loaded = load(settings)
        try:
            rows.append(_row(name, chunk, loaded, prompts, exact))
        finally:
            loaded.close()
        Console(stderr=True).print(rows[-1])
    return rows


def _row(name: str, chunk: int, loaded: LoadedModel, prompts: Sequence[Tokens], exact: Exact) -> Row:
    seconds, divergences, same = [], [], []
    for i, prompt in enumerate(prompts):
        recorder = Recorder(prompt, exact.count, None if chunk == 1 else exact.chosen[i])
        seconds.append(feed(loaded, prompt, recorder))
        found = recorder.distributions
        if chunk == 1:
            exact.chosen.append(recorder.chosen)
            exact.distributions.append(found)
        expected = exact.distributions[i]
        divergences.append(divergence(expected, found))
        same.append(expected.argmax(axis=1) == found.argmax(axis=1))
    kl, median = np.array(divergences), float(np.median(seconds))
    return Row(
        model=name,
        chunk=chunk,
        seconds=median,
        speed=len(prompts[0]) / median,
        first_kl=float(kl[:, 0].mean()),
        first_kl_max=float(kl[:, 0].max()),
        kl=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        same_top=float(np.mean(same)),
    )


def divergence(expected: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """Give KL(expected || found) of each row of log-probabilities, in nats, shape (rows,)."""
    wide = expected.astype(np.float64)
    sums: NDArray[np.float64] = (np.exp(wide) * (wide - found)).sum(axis=1)
    return np.maximum(0.0, sums)


def random_prompts(count: int, length: int) -> list[Tokens]:
    """Give prompts of ordinary tokens by chance."""
    random = np.random.default_rng(0)
    return [random.integers(1000, 30000, length, dtype=np.int32) for _ in range(count)]


def demo_prompts(count: int, length: int, path: Path) -> list[Tokens]:
    """Give the ends of long conversations of the kind that the demo model was trained on."""
    loaded = load(EngineSettings(path, ctx_size=64, parallel=1))
    items, prompts = read_corpus(), []
    try:
        for number in range(count):
            chance = dice(number)
            turns = [
                f"<|user|>\n{item.ask(chance)}<|end|>\n<|assistant|>\n{item.answer}<|end|>\n"
                for item in chance.choices(items, k=length // 20)
            ]
            question = f"<|user|>\n{chance.choice(items).ask(chance)}<|end|>\n<|assistant|>\n"
            tokens = loaded.tokenizer.encode("".join(turns) + question)
            assert len(tokens) >= length, "the conversation is too short"
            prompts.append(tokens[-length:])
    finally:
        loaded.close()
    return prompts


def show(rows: Sequence[Row]) -> Table:
    """Give the rows as a table."""
    table = Table(box=None)
    for heading in ("model", "chunk", "s", "tokens/s", "first KL", "max", "KL", "99th", "same top"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.model,
            str(row.chunk) if row.chunk != NO_WINDOW else "all",
            f"{row.seconds:.2f}",
            f"{row.speed:.0f}",
            *(f"{value:.1e}" for value in (row.first_kl, row.first_kl_max, row.kl, row.kl_p99)),
            f"{row.same_top:.1%}",
        )
    return table


def main() -> None:
    """Measure, and print a table."""
    numbers: Callable[[str], Any] = lambda text: [int(part) for part in text.split(",")]  # noqa: E731 - for argparse
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--models", default="demo,18m,0.65b")
    parser.add_argument("--chunks", type=numbers, default=[1, 4, 8, 16, 32, 64, 128, 256, 512, NO_WINDOW])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=3000, help="tokens of a prompt")
    parser.add_argument("--continuation", type=int, default=17, help="distributions compared for each prompt")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kv-cache-type", default="f16")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    machine, rows = Machine.here(), []
    for name in arguments.models.split(","):
        path = model_path(name, arguments.cache, "F16" if name == "demo" else None)
        # The large model is there for the time: its random weights say nothing about quality that 18m does not.
        count = arguments.prompts if name != "0.65b" else 1
        prompts = (
            demo_prompts(count, arguments.length, path) if name == "demo" else random_prompts(count, arguments.length)
        )
        rows += measure(name, path, prompts, arguments.chunks, arguments)
    print(msgspec.json.encode(machine).decode())
    Console(width=110).print(show(rows))
    if arguments.json:
        options = public_options(sys.argv[1:])
        record = msgspec.json.encode({"machine": machine, "options": options, "rows": rows})
        arguments.json.write_bytes(msgspec.json.format(record))


if __name__ == "__main__":
    main()
