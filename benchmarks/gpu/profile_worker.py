"""Where the time of a decode step goes inside the engine's process.

    python -m benchmarks.gpu.profile_worker model.gguf --rows 1,8,32

Requests run in the engine as in the service, without HTTP. A step lasts from one decode call to the next. The part of
llama.cpp (computing, and copying logits to the host, for which the call waits) and that of choosing tokens are timed
around those calls. The rest is scheduling, handing tokens to the event loop, and waiting for the interpreter lock.

All requests of a measurement are in the engine before it decodes anything, and none ends before all have generated
`--tokens` tokens side by side, however fast the machine is.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

from benchmarks.gpu.worker import answer
from edge_phi3.engine import core
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.sequence import FinishedEvent, GenerationRequest
from edge_phi3.generation import GenerationConfig

_CELLS_PER_ROW = 256
_PROMPT = 64


class Split(msgspec.Struct, kw_only=True):
    """One step's milliseconds, medians over the steps in which all rows decode.

    Attributes:
        rows: sequences that decode together.
        mode: how tokens are chosen.
        steps: number of steps measured.
        step: from one decode call to the next.
        decode: the call itself.
        choose: choosing tokens.
        rest: what is left.
        loop: processor time of the event loop's thread, a step, while it is given tokens and does nothing with them.
        tokens_per_second: of all rows.
    """

    rows: int
    mode: str
    steps: int
    step: float
    decode: float
    choose: float
    rest: float
    loop: float
    tokens_per_second: float


@dataclass(frozen=True)
class Decode:
    """A decode call: when it began, how long it took, its tokens, and how many of them had their logits asked for."""

    started: float
    seconds: float
    tokens: int
    rows: int


@dataclass
class Clock:
    """What happened: decode calls, and starts and lengths of choices. Nothing is decoded until `go` is set."""

    go: threading.Event = field(default_factory=threading.Event)
    decodes: list[Decode] = field(default_factory=list)
    choices: list[tuple[float, float]] = field(default_factory=list)

    def timed_decode(self, decode: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
        """Wrap a context's decode call."""

        def timed(count: int, rows: int) -> Any:
            self.go.wait()
            started = time.perf_counter()
            logits = decode(count, rows)
            self.decodes.append(Decode(started, time.perf_counter() - started, count, rows))
            return logits

        return timed

    def timed_choice(self, choose: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the choice of tokens."""

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            chosen = choose(*arguments, **options)
            self.choices.append((started, time.perf_counter() - started))
            return chosen

        return timed

    def split(self, rows: int, mode: str, loop_seconds: float) -> Split:
        """Give the medians of the steps in which `rows` tokens were decoded, each for another sequence."""
        steps = []
        choices = iter(self.choices)
        choice = next(choices, None)
        for now, following in itertools.pairwise(self.decodes):
            while choice is not None and choice[0] < now.started:
                choice = next(choices, None)
            chosen = choice[1] if choice is not None and choice[0] < following.started else 0.0
            if now.tokens == now.rows == following.tokens == following.rows == rows:
                steps.append((following.started - now.started, now.seconds, chosen))
        if not steps:
            raise RuntimeError(f"no step decoded {rows} rows together")
        step, decode, choose = (1e3 * statistics.median(column) for column in zip(*steps, strict=True))
        return Split(
            rows=rows,
            mode=mode,
            steps=len(steps),
            step=step,
            decode=decode,
            choose=choose,
            rest=step - decode - choose,
            loop=1e3 * loop_seconds / len(self.decodes),
            tokens_per_second=rows / (step / 1e3),
        )


def measure(engine: Engine, rows: int, mode: str, tokens: int) -> Split:
    """Let `rows` requests generate side by side, each `tokens` tokens and those of the steps before all are there."""
    clock = Clock()
    contexts = [runner.context for runner in engine.model.runners]
    choose = core.advance
    for context in contexts:
        context.decode = clock.timed_decode(context.decode)  # type: ignore[method-assign] # measured from outside
    core.advance = clock.timed_choice(choose)
    # One request's prompt may go alone; the others' follow in full batches, beside the rows that go on already.
    before = 2 + -(-rows * _PROMPT // max(1, contexts[0].batch_size - rows))
    try:
        loop_seconds = uvloop.run(_generate(engine, rows, mode, tokens + before, clock.go))
    finally:
        clock.go.set()
        core.advance = choose
        for context in contexts:
            del context.decode
    return clock.split(rows, mode, loop_seconds)


async def _generate(engine: Engine, rows: int, mode: str, tokens: int, go: threading.Event) -> float:
    kwargs: dict[str, Any] = {"max_new_tokens": tokens, "max_length": None, "eos_token_id": []}
    kwargs |= {"do_sample": False} if mode == "greedy" else {"do_sample": True, "top_k": 10, "temperature": 1.0}
    config = GenerationConfig.resolve(kwargs, engine.model.defaults)
    random = np.random.default_rng([rows, mode == "greedy"])

    async def one(prompt: Any) -> None:
        async for event in engine.generate(GenerationRequest(prompt, config, stream=True)):
            assert not isinstance(event, FinishedEvent) or event.generated_tokens == tokens

    prompts = random.integers(1000, min(30000, engine.model.defaults.vocab_size), (rows, _PROMPT), dtype=np.int32)
    async with asyncio.TaskGroup() as group:
        for prompt in prompts:
            group.create_task(one(prompt))
        while (stats := engine.stats()).waiting + stats.running < rows:  # noqa: ASYNC110 - the engine tells nobody
            await asyncio.sleep(0.001)
        before = time.thread_time()
        go.set()
    return time.thread_time() - before


def main() -> None:
    """Measure each number of rows in each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="generated by each request")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["greedy", "sampled"])
    parser.add_argument("--threads", type=int, default=0, help="of the CPU backend; default: one on each core")
    parser.add_argument("--cpu", action="store_true", help="no layer on the GPU")
    arguments = parser.parse_args()
    most = max(arguments.rows)
    settings = EngineSettings(
        arguments.model,
        ctx_size=most * _CELLS_PER_ROW,
        parallel=most,
        prefix_cache=False,
        threads=arguments.threads,
        n_gpu_layers=0 if arguments.cpu else -1,
    )
    engine = Engine(settings)
    engine.load()
    try:
        measure(engine, most, "greedy", 8)  # warm
        splits = [measure(engine, rows, mode, arguments.tokens) for rows in arguments.rows for mode in arguments.modes]
    finally:
        engine.close()
    answer(splits)


if __name__ == "__main__":
    main()
