"""What the engine adds to a step, as a multiple of one NumPy pass over the same logits.

    pytest benchmarks/test_engine_overhead.py

The whole engine runs: it plans a batch, "decodes" it, chooses a token for each row, continues the sequences and queues
events. The context computes nothing and returns logits that it was given, so that all the time is the engine's own. The
yardstick, ``argmax`` (for top-p: ``np.partition``), is timed between the steps of the same run; medians are compared.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.events import EventBatcher
from edge_phi3.engine.model_runner import ModelRunner
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import GenerationRequest
from edge_phi3.generation import GenerationConfig, ModelDefaults

PROMPT_LENGTH = 64
WINDOW = 2047
WARM_UP = 20
ROUNDS = 60

Yardstick = Callable[[NDArray[np.float32]], object]


def _ignore(_event: object) -> None:
    pass


def _best(logits: NDArray[np.float32]) -> object:
    return logits.argmax(axis=1)


def _partition(logits: NDArray[np.float32]) -> object:
    return np.partition(logits, logits.shape[1] // 2, axis=1)


MODES: dict[str, tuple[dict[str, Any], Yardstick]] = {
    "greedy": ({"do_sample": False}, _best),
    "default sampling": ({}, _best),
    "temperature and top-p": ({"temperature": 0.8, "top_p": 0.95, "top_k": 0}, _partition),
}


class StillContext:
    """A context that computes nothing: every batch has the same logits."""

    def __init__(self, rows: int, vocabulary: int) -> None:
        self.cells, self.batch_size = rows * 1024, 512
        self.sequences = self.scratch = self.scored = rows
        self.offloaded, self.saves = True, False
        self.tokens, self.positions, self.seq_ids = (np.zeros(self.batch_size, np.int32) for _ in range(3))
        self.wants_logits = np.zeros(self.batch_size, np.int8)
        # What a trained model's logits look like: most far below a few.
        self.logits = (np.random.default_rng(1).standard_normal((rows, vocabulary)) * 3).astype(np.float32)

    def decode(self, count: int, rows: int, beside: Callable[[], None] = lambda: None) -> NDArray[np.float32]:
        """Return logits at once."""
        beside()
        assert count <= self.batch_size
        return self.logits[:rows]

    def copy(self, source: int, target: int) -> None:
        """Share cells that do not exist."""

    def remove(self, seq_id: int, start: int, end: int) -> None:
        """Free cells that do not exist."""

    def clear(self, *, zero: bool = False) -> None:
        """Empty a cache that does not exist."""


def _engine(rows: int, vocabulary: int, parameters: dict[str, Any]) -> tuple[EngineCore, StillContext]:
    """Return an engine whose every row decodes."""
    context = StillContext(rows, vocabulary)
    # The context has only what a step calls: nothing is saved, restored, warmed up or aborted here.
    runner = ModelRunner(context, window=WINDOW, window_chunk=32)  # type: ignore[arg-type]  # see above
    core = EngineCore(Scheduler([runner], parallel=rows), EventBatcher(0.1))
    defaults = ModelDefaults(
        vocab_size=vocabulary, bos_token_id=1, eos_token_ids=(2,), pad_token_id=2, context_length=4096
    )
    generator = np.random.default_rng(2)
    for _ in range(rows):
        config = GenerationConfig.resolve({"max_new_tokens": 900, "eos_token_id": []} | parameters, defaults)
        prompt = generator.integers(0, vocabulary, PROMPT_LENGTH, dtype=np.int32)
        core.submit(GenerationRequest(prompt, config, stream=True), _ignore)
    while not (len(runner.running) == rows and all(request.decoding for request in runner.running)):
        core.step()
    for _ in range(WARM_UP):
        core.step()
    return core, context


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vocabulary", [32064, 200064])
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_step(benchmark: BenchmarkFixture, rows: int, vocabulary: int, mode: str) -> None:
    """Time steps in which every row decodes, and the yardstick between them."""
    parameters, yardstick = MODES[mode]
    core, context = _engine(rows, vocabulary, parameters)
    passes: list[float] = []

    def measure_pass() -> None:
        start = time.perf_counter()
        yardstick(context.logits)
        passes.append(time.perf_counter() - start)

    benchmark.pedantic(core.step, setup=measure_pass, rounds=ROUNDS)
    assert benchmark.stats is not None
    benchmark.extra_info["ratio"] = benchmark.stats.stats.median / statistics.median(passes)
