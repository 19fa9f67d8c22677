"""The prefix cache: the radix tree against looking at every sequence, and the time to the first token.

pytest benchmarks/test_prefix_cache.py
"""

from __future__ import annotations

import queue
import statistics
import time
import timeit
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.prefix_tree import PrefixTree
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest, TokensEvent
from edge_phi3.engine.settings import EngineSettings
from edge_phi3.generation.config import GenerationConfig

Tokens = NDArray[np.int32]

ROUNDS = 200
PREFIX, TAIL, SYSTEM_PROMPTS = 500, 500, 8


def sequences(count: int) -> list[Tokens]:
    """Give conversations of 1,000 tokens that begin with one of eight system prompts."""
    random = np.random.default_rng(0)
    systems = random.integers(1, 32000, (SYSTEM_PROMPTS, PREFIX), dtype=np.int32)
    return [
        np.concatenate([systems[index % SYSTEM_PROMPTS], random.integers(1, 32000, TAIL, dtype=np.int32)])
        for index in range(count)
    ]


def linear_match(cached: list[Tokens], tokens: Tokens) -> int:
    """Give the longest shared prefix by comparing with every sequence."""
    longest = 0
    for candidate in cached:
        count = min(len(candidate), len(tokens))
        differing = np.flatnonzero(candidate[:count] != tokens[:count])
        longest = max(longest, int(differing[0]) if len(differing) else count)
    return longest


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("count", [16, 64, 256])
def test_match(count: int, benchmark: BenchmarkFixture) -> None:
    """Find what a new turn of one of the conversations shares."""
    cached = sequences(count)
    cache = PrefixTree()
    for seq_id, tokens in enumerate(cached):
        cache.insert(seq_id, tokens)
    asked = np.concatenate([cached[count // 2], np.arange(1, 50, dtype=np.int32)])
    assert cache.match(asked) == (len(cached[0]), [count // 2])
    assert linear_match(cached, asked) == len(cached[0])
    benchmark.pedantic(lambda: cache.match(asked), rounds=ROUNDS, iterations=10, warmup_rounds=5)
    linear = min(timeit.repeat(lambda: linear_match(cached, asked), time.process_time, number=1, repeat=ROUNDS))
    told(benchmark, f"match among {count} sequences", linear)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("count", [16, 256])
def test_insert(count: int, benchmark: BenchmarkFixture) -> None:
    """Enter a finished sequence, and forget it again."""
    cached = sequences(count)
    cache = PrefixTree()
    for seq_id, tokens in enumerate(cached):
        cache.insert(seq_id, tokens)
    new = sequences(count + 1)[-1]

    def enter() -> None:
        cache.insert(count, new)
        cache.remove(count)

    benchmark.pedantic(enter, rounds=ROUNDS, iterations=10, warmup_rounds=5)
    assert cache.match(new)[0] == PREFIX
    linear = min(timeit.repeat(lambda: linear_match(cached, new), time.process_time, number=1, repeat=ROUNDS))
    told(benchmark, f"insert and remove among {count} sequences", linear)


def told(benchmark: BenchmarkFixture, case: str, linear: float) -> None:
    """Tell a case's figures beside one look at every sequence."""
    ratio = linear / benchmark.stats.stats.min
    benchmark.extra_info |= {
        "case": case,
        "comparison_milliseconds": round(linear * 1e3, 4),
        "ratio": round(ratio, 1),
    }
    print(f"\n{case}: {benchmark.stats.stats.min * 1e6:.1f} us, one linear scan takes {ratio:.1f} times as long")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at Q4_K_M."""
    folder = tmp_path_factory.mktemp("prefix")
    source = convert(DEMO_CHECKPOINT, folder / "demo.gguf").path
    return quantize(source, folder / "demo-Q4_K_M.gguf", type="Q4_K_M").path


@pytest.fixture
def engines(model: Path) -> Iterator[tuple[Engine, Engine]]:
    """Two engines on the same model: with a prefix cache, and without."""
    pair = tuple(Engine(EngineSettings(model, ctx_size=4096, prefix_cache=cached)) for cached in (True, False))
    for engine in pair:
        engine.load()
    yield pair[0], pair[1]
    for engine in pair:
        engine.close()


def first_token(engine: Engine, prompt: Tokens) -> tuple[float, int]:
    """Ask for one token; give the seconds to it, and how many of the prompt's were cached."""
    config = GenerationConfig.resolve(
        {"do_sample": False, "max_length": None, "max_new_tokens": 1}, engine.model.defaults
    )
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(GenerationRequest(prompt, config), events.put)
    event = events.get()
    while isinstance(event, TokensEvent):
        event = events.get()
    assert isinstance(event, FinishedEvent), event
    return event.timing.first_token, event.cached_tokens


def test_first_token(engines: tuple[Engine, Engine], benchmark: BenchmarkFixture) -> None:
    """Time to the first token of prompts that share their first 1,000 tokens with an earlier one."""
    random = np.random.default_rng(0)
    shared = random.integers(1, 3000, 1000, dtype=np.int32)
    warm: list[float] = []
    cold: list[float] = []

    def without() -> tuple[tuple[Tokens], dict[str, object]]:
        prompt = np.concatenate([shared, random.integers(1, 3000, 24, dtype=np.int32)])
        seconds, cached = first_token(engines[1], prompt)
        assert cached == 0
        cold.append(seconds)
        return (prompt,), {}

    def with_cache(prompt: Tokens) -> None:
        seconds, cached = first_token(engines[0], prompt)
        assert cached == len(shared)
        warm.append(seconds)

    first_token(engines[0], shared)
    benchmark.pedantic(with_cache, setup=without, rounds=30)
    benchmark.extra_info |= {
        "case": "first token behind 1,000 shared tokens, compared with no cache",
        "comparison_milliseconds": round(statistics.median(cold) * 1e3, 2),
        "ratio": round(statistics.median(b / a for a, b in zip(warm, cold, strict=True)), 1),
    }
