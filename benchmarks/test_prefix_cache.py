"""The prefix cache: the time to the first token behind a prompt that is known, with it and without.

pytest benchmarks/test_prefix_cache.py
"""

import queue
import statistics
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
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest, TokensEvent
from edge_phi3.generation.config import GenerationConfig

Tokens = NDArray[np.int32]


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
    """Ask for one token; return the seconds to it, and how many of the prompt's were cached."""
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
