"""What llama.cpp's sampler chain computes of the parameters that it shares with transformers, and what we do.

The service does not sample through the chain, which is slower (``benchmarks/test_generation_kernels.py``). These tests
say that it could, for which parameters, and hold the mapping that ``docs/parameters.md`` tells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.generation import GenerationConfig, ModelDefaults
from edge_phi3.generation.logits import softmax
from edge_phi3.generation.processors import build_processors
from edge_phi3.generation.warpers import Warping, warp
from tests.support.sampler_chain import SamplerChain

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SIZE = 32064
HISTORY = [*range(100, 160), 5, 5, 7]
CASES: tuple[dict[str, Any], ...] = (
    {"top_k": 10},
    {"top_k": 40, "temperature": 0.7},
    {"top_k": 0, "temperature": 1.7},
    {"top_k": 0, "top_p": 0.9},
    {"top_k": 200, "top_p": 0.8, "temperature": 0.6},
    {"top_k": 0, "min_p": 0.05},
    {"top_k": 300, "typical_p": 0.7},
    {"top_k": 50, "typical_p": 0.9, "min_p": 0.01, "top_p": 0.95},
    {"top_k": 10, "repetition_penalty": 1.3},
    {"top_k": 0, "repetition_penalty": 0.8, "temperature": 0.9, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.95},
)


def ours(logits: NDArray[np.float32], kwargs: dict[str, Any]) -> dict[int, float]:
    """Return the probability of each token that is left."""
    defaults = ModelDefaults(
        vocab_size=SIZE, bos_token_id=1, eos_token_ids=(32000,), pad_token_id=32000, context_length=4096
    )
    config = GenerationConfig.resolve(kwargs, defaults)
    history = np.array([HISTORY], dtype=np.int32)
    scores = logits[None].copy()
    for processor in build_processors(config, history[0, :40]):
        processor(history, scores)
    left = warp(scores, [Warping.of(config)])
    columns = np.flatnonzero(left.scores[0] > -np.inf)
    tokens = left.token_ids(np.zeros_like(columns), columns)
    probabilities = softmax(left.scores, whole=left.tokens is None)[0, columns]
    return dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))


@pytest.mark.parametrize("kwargs", CASES, ids=str)
@pytest.mark.parametrize("spread", [2.0, 4.0])
def test_the_chain_gives_the_same_probabilities(kwargs: dict[str, Any], spread: float) -> None:
    for seed in range(3):
        logits = (np.random.default_rng(seed).standard_normal(SIZE) * spread).astype(np.float32)
        with SamplerChain(SIZE, HISTORY, **kwargs) as chain:
            drawn, left = chain(logits)
        expected = ours(logits, kwargs)
        theirs = dict(zip(left["id"].tolist(), left["p"].tolist(), strict=True))
        assert drawn in theirs
        # llama.cpp adds up probabilities one by one in float32, so at an edge it may keep a token more or less.
        assert len(expected.keys() ^ theirs.keys()) <= 1
        both = sorted(expected.keys() & theirs.keys())
        shares = np.array([[expected[token], theirs[token]] for token in both])
        np.testing.assert_allclose(*(shares / shares.sum(axis=0)).T, rtol=0, atol=1e-5)
