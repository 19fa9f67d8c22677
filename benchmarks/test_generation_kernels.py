"""What choosing tokens costs per decode step, as a multiple of one ``np.argmax`` over the same rows.

    pytest benchmarks/test_generation_kernels.py

The vocabulary has 32,064 words, as Phi-3's. Each case holds the logits of many requests, as the engine does, and stands
in its second step or later. ``argmax`` is timed in the same run, before and after; the fastest of many rounds counts on
both sides, so that the ratio says little of how busy the machine is.
"""

import timeit
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.sampler_chain import SamplerChain
from benchmarks.timings import timings
from edge_phi3.generation import Decoder, GenerationConfig, ModelDefaults, advance, make_decoder

VOCABULARY = 32064
ENDS = (32000, 32001, 32007)
PROMPT_LENGTH = 512
ROUNDS = 150

EVERYTHING: dict[str, Any] = {
    "sequence_bias": [[[5], 1.0], [[6, 7], 2.0]],
    "encoder_repetition_penalty": 1.1,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 4,
    "bad_words_ids": [[9], [10, 11]],
    "min_length": 5000,
    "forced_eos_token_id": 32000,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [0, 1.0001],
    "suppress_tokens": [12, 13],
    "begin_suppress_tokens": [14],
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.01,
    "typical_p": 0.95,
    "epsilon_cutoff": 1e-4,
    "eta_cutoff": 1e-4,
    "renormalize_logits": True,
}


@dataclass(frozen=True)
class Case:
    """Some requests of one kind.

    Attributes:
        name: what is measured.
        kwargs: what each request asks for.
        requests: how many there are.
        rows: sequences of each request.
        bound: how many times ``argmax`` a step may cost; None where it is only reported.
    """

    name: str
    kwargs: dict[str, Any]
    requests: int
    rows: int = 1
    bound: float | None = None


BEAMS: dict[str, Any] = {"do_sample": False, "num_beams": 8}
CASES = (
    Case("greedy", {"do_sample": False}, 16, bound=2),
    Case("greedy", {"do_sample": False}, 8, bound=2),
    Case("greedy", {"do_sample": False}, 1),
    Case("defaults (sampled, top-k 10)", {}, 16, bound=12),
    Case("defaults (sampled, top-k 10)", {}, 8, bound=12),
    Case("defaults (sampled, top-k 10)", {}, 1),
    Case("temperature and top-p after top-k", {"temperature": 0.7, "top_p": 0.9}, 16),
    Case("repetition penalty", {"repetition_penalty": 1.2}, 16),
    Case("sampled from the whole vocabulary", {"top_k": 0}, 16),
    Case("top-p alone", {"top_k": 0, "top_p": 0.9}, 16),
    Case("8 beams", BEAMS, 1, 8, bound=25),
    Case("8 beams", BEAMS, 2, 8, bound=25),
    Case("8 beams, sampled", {"num_beams": 8}, 1, 8),
    Case("8 beams, sampled from the whole vocabulary", {"num_beams": 8, "top_k": 0}, 1, 8),
    Case("8 beams in 4 groups", BEAMS | {"num_beam_groups": 4, "diversity_penalty": 1.0}, 1, 8),
    Case("every processor and warper", EVERYTHING, 16, bound=80),
    Case("every processor and warper", EVERYTHING, 8, bound=80),
)


def random_logits(rows: int) -> NDArray[np.float32]:
    """Return logits in which some tokens are far more likely than others, and the end tokens are not."""
    logits = (np.random.default_rng(rows).standard_normal((rows, VOCABULARY)) * 3).astype(np.float32)
    logits[:, ENDS] = -50
    return logits


def running(case: Case) -> list[Decoder]:
    """Return requests that are past their first step."""
    defaults = ModelDefaults(
        vocab_size=VOCABULARY, bos_token_id=1, eos_token_ids=ENDS, pad_token_id=32000, context_length=4096
    )
    config = GenerationConfig.resolve({"max_length": 100_000, "seed": 1} | case.kwargs, defaults)
    random = np.random.default_rng(0)
    decoders = [
        make_decoder(config, random.integers(1, 30_000, PROMPT_LENGTH, dtype=np.int32)) for _ in range(case.requests)
    ]
    advance(decoders, random_logits(case.requests))
    assert all(decoder.rows == case.rows for decoder in decoders)
    return decoders


def argmax_seconds(logits: NDArray[np.float32]) -> float:
    """Time one ``argmax`` over all rows."""
    return min(timeit.repeat(lambda: logits.argmax(axis=1), number=20, repeat=20)) / 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, {case.requests * case.rows} rows")
def test_cost_of_choosing_tokens(case: Case, benchmark: BenchmarkFixture) -> None:
    """Time one step of all requests of a case."""
    decoders = running(case)
    fresh = random_logits(case.requests * case.rows)
    logits = np.empty_like(fresh)

    def setup() -> tuple[tuple[list[Decoder], NDArray[np.float32]], dict[str, Any]]:
        np.copyto(logits, fresh)  # the last step may have overwritten them
        return (decoders, logits), {}

    before = argmax_seconds(fresh)
    benchmark.pedantic(advance, setup=setup, rounds=ROUNDS, warmup_rounds=5)
    argmax = min(before, argmax_seconds(fresh))
    assert not any(decoder.finished for decoder in decoders)
    ratio = timings(benchmark).min / argmax
    rows = case.requests * case.rows
    benchmark.extra_info |= {
        "case": f"{case.name}, {rows} rows",
        "microseconds_per_row": round(timings(benchmark).min / rows * 1e6, 2),
        "times_argmax": round(ratio, 1),
        "at_most": case.bound,
    }
    print(f"\n{case.name}, {rows} rows: {ratio:.1f} times argmax (at most {case.bound})")
    if case.bound is not None:
        assert ratio <= case.bound


@pytest.mark.parametrize(
    "kwargs",
    [{"do_sample": False, "top_k": 1}, {"top_k": 10}, {"top_k": 40, "temperature": 0.8, "top_p": 0.95, "min_p": 0.05}],
    ids=["greedy", "defaults", "temperature, top-k, top-p, min-p"],
)
def test_llama_cpps_sampler_chain_is_no_faster(
    kwargs: dict[str, Any], benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> None:
    """Time the same choice for 16 rows through llama.cpp, row by row."""
    rows = 16
    logits = random_logits(rows)
    chains = [SamplerChain(VOCABULARY, seed=row, **kwargs) for row in range(rows)]
    benchmark.pedantic(lambda: [chain.draw(line) for chain, line in zip(chains, logits, strict=True)], rounds=ROUNDS)
    decoders = running(Case("", kwargs, rows))
    work = logits.copy()
    ours = min(timeit.repeat(lambda: advance(decoders, work), number=1, repeat=ROUNDS))
    benchmark.extra_info |= {
        "case": f"llama.cpp's chain, {rows} rows: {request.node.callspec.id}",
        "ours_milliseconds": round(ours * 1e3, 3),
    }
    print(f"\n16 rows: {timings(benchmark).min * 1e6:.0f} us in llama.cpp, {ours * 1e6:.0f} us here")
    assert ours < timings(benchmark).min
