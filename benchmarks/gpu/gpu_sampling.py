"""Choosing tokens where the logits are (`llama_set_sampler`) against choosing them in NumPy, step by step in turns.

    python -m benchmarks.gpu.gpu_sampling model.gguf --rows 1,8,32

With a sampler on every sequence llama.cpp computes the choice as part of the graph, and copies one token a row to the
host instead of the whole row of logits. An experiment: the product chooses in NumPy, which knows all of transformers'
parameters, and may take this over for greedy and top-k requests where it wins.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.worker import answer
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.generation import GenerationConfig, ModelDefaults, advance, make_decoder
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model

_PROMPT = 32
_TOP_K = 10
_WARM = 4


class Comparison(msgspec.Struct, kw_only=True):
    """One number of rows in one mode.

    Attributes:
        rows: sequences that decode together.
        mode: "greedy" or "top-k".
        steps: steps measured.
        numpy: milliseconds of a step with the choice in NumPy, median.
        offloaded: the same with the choice in llama.cpp's graph.
        ratio: median of the steps' ratios, above 1 when the graph's choice is faster.
        low: the smallest of the middle nine tenths.
        high: the largest of them.
        same_tokens: whether both chose the same greedy tokens; None for top-k, which draws.
    """

    rows: int
    mode: str
    steps: int
    numpy: float
    offloaded: float
    ratio: float
    low: float
    high: float
    same_tokens: bool | None


class Sequences:
    """Sequences that decode side by side in a context of their own.

    Args:
        model: the weights.
        settings: threads and types.
        rows: how many.
        steps: tokens that each will decode.
    """

    def __init__(self, model: Model, settings: EngineSettings, *, rows: int, steps: int) -> None:
        cells = -(-(rows * (_PROMPT + steps)) // 256) * 256
        self.rows = rows
        self.context = Context(model, cells=cells, sequences=rows, settings=settings)
        self.tokens = np.random.default_rng(rows).integers(1000, 30000, rows, dtype=np.int32)
        self._position = _PROMPT
        context = self.context
        for row in range(rows):
            context.tokens[:_PROMPT] = np.random.default_rng(row).integers(1000, 30000, _PROMPT)
            context.positions[:_PROMPT] = np.arange(_PROMPT)
            context.seq_ids[:_PROMPT] = row
            context.wants_logits[:_PROMPT] = 0
            context.decode(_PROMPT, 0)

    def fill(self) -> None:
        """Put the last chosen tokens into the batch."""
        context, rows = self.context, self.rows
        context.tokens[:rows] = self.tokens
        context.positions[:rows] = self._position
        context.seq_ids[:rows] = np.arange(rows)
        context.wants_logits[:rows] = 1
        self._position += 1

    def close(self) -> None:
        """Free the context."""
        self.context.close()


class InNumPy(Sequences):
    """As the product chooses."""

    def __init__(self, model: Model, settings: EngineSettings, *, rows: int, steps: int, mode: str) -> None:
        super().__init__(model, settings, rows=rows, steps=steps)
        defaults = ModelDefaults(
            vocab_size=model.vocab_size, bos_token_id=1, eos_token_ids=(), pad_token_id=0, context_length=4096
        )
        kwargs: dict[str, Any] = {"max_new_tokens": steps + 1, "max_length": None, "eos_token_id": []}
        kwargs |= {"do_sample": False} if mode == "greedy" else {"do_sample": True, "top_k": _TOP_K}
        config = GenerationConfig.resolve(kwargs, defaults)
        self._decoders = [make_decoder(config, self.tokens[row : row + 1]) for row in range(rows)]

    def step(self) -> float:
        """Decode and choose one token of each sequence; give the seconds it took."""
        started = time.perf_counter()
        self.fill()
        logits = self.context.decode(self.rows, self.rows)
        steps = advance(self._decoders, logits)
        self.tokens = np.array([token for step in steps for token in step.tokens], np.int32)
        return time.perf_counter() - started


class InGraph(Sequences):
    """As llama.cpp's backend chooses.

    Raises:
        RuntimeError: llama.cpp does not take the samplers.
    """

    def __init__(self, model: Model, settings: EngineSettings, *, rows: int, steps: int, mode: str) -> None:
        super().__init__(model, settings, rows=rows, steps=steps)
        self._handle = self.context._handle  # noqa: SLF001 - the product has no call for this experiment
        self._batch = self.context._batch  # noqa: SLF001 - the same
        self._chains = []
        for row in range(rows):
            params = llama_cpp.llama_sampler_chain_default_params()
            params.no_perf = True
            chain = llama_cpp.llama_sampler_chain_init(params)
            if mode == "greedy":
                llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
            else:
                llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(_TOP_K))
                llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(row))
            self._chains.append(chain)
            if not llama_cpp.llama_set_sampler(self._handle, row, chain):
                raise RuntimeError("llama.cpp does not run these samplers in its graph")

    def step(self) -> float:
        """Decode and choose one token of each sequence; give the seconds it took."""
        started = time.perf_counter()
        self.fill()
        self._batch.n_tokens = self.rows
        status = llama_cpp.llama_decode(self._handle, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave status {status}")
        get, handle = llama_cpp.llama_get_sampled_token_ith, self._handle
        self.tokens = np.fromiter((get(handle, row) for row in range(self.rows)), np.int32, self.rows)
        if self.tokens.min() < 0:
            raise RuntimeError("llama.cpp chose no token in its graph")
        return time.perf_counter() - started

    def close(self) -> None:
        """Free the context and the samplers."""
        super().close()
        for chain in self._chains:
            llama_cpp.llama_sampler_free(chain)


def compare(model: Model, settings: EngineSettings, *, rows: int, mode: str, steps: int) -> Comparison:
    """Run both in turns, so that what slows the machine slows both."""
    shape: dict[str, Any] = {"rows": rows, "steps": steps + _WARM, "mode": mode}
    ours, graph = InNumPy(model, settings, **shape), InGraph(model, settings, **shape)
    try:
        times, tokens = [], []
        for number in range(steps + _WARM):
            pair: tuple[float, float]
            if number % 2:
                second = graph.step()
                pair = ours.step(), second
            else:
                first = ours.step()
                pair = first, graph.step()
            tokens.append((ours.tokens.copy(), graph.tokens.copy()))
            if number >= _WARM:
                times.append(pair)
    finally:
        ours.close()
        graph.close()
    ratios: NDArray[np.float64] = np.array([mine / theirs for mine, theirs in times])
    low, high = np.percentile(ratios, [5, 95]).tolist()
    return Comparison(
        rows=rows,
        mode=mode,
        steps=steps,
        numpy=1e3 * statistics.median(mine for mine, _ in times),
        offloaded=1e3 * statistics.median(theirs for _, theirs in times),
        ratio=float(np.median(ratios)),
        low=low,
        high=high,
        same_tokens=all(np.array_equal(a, b) for a, b in tokens) if mode == "greedy" else None,
    )


def main() -> None:
    """Compare each number of rows in both modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU backend; default: one on each core")
    parser.add_argument("--cpu", action="store_true", help="no layer on the GPU")
    arguments = parser.parse_args()
    settings = EngineSettings(arguments.model, threads=arguments.threads)
    model = Model(arguments.model, n_gpu_layers=0 if arguments.cpu else -1)
    try:
        answer(
            [
                compare(model, settings, rows=rows, mode=mode, steps=arguments.steps)
                for rows in arguments.rows
                for mode in ("greedy", "top-k")
            ]
        )
    finally:
        model.close()


if __name__ == "__main__":
    main()
