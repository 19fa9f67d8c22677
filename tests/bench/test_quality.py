"""Perplexity and divergence against their definitions in float64; tests/parity asks llama-perplexity itself."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.bench import BenchError
from edge_phi3.bench import quality as quality_module
from edge_phi3.bench.quality import Quality, cut_chunks, evaluate, scored_positions, writing
from edge_phi3.bench.quants import evaluation_text
from edge_phi3.conversion.imatrix import calibration_text
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model

SIZE = 128
KINDS = ("F16", "Q3_K_S")


class Measured(NamedTuple):
    """Contexts of the demo model in two types, for one chunk each, and what was measured with them.

    `base` is the reference's quality, `quality` that of Q3_K_S, and `log_probs` the file between them.
    """

    contexts: dict[str, Context]
    chunks: NDArray[np.int32]
    log_probs: Path
    base: Quality
    quality: Quality


@pytest.fixture(scope="module")
def measured(model_file: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    log_probs = tmp_path_factory.mktemp("reference") / "reference.npy"
    with contextlib.ExitStack() as stack:
        contexts = {}
        for name in KINDS:
            model = stack.enter_context(contextlib.closing(Model(model_file("demo", name), n_gpu_layers=0)))
            # F16 takes two batches a chunk: the second half begins inside the one and goes on in the other. With
            # quantised weights batches of other sizes round otherwise.
            settings = EngineSettings(model.path, threads=1, batch_size=80 if name == "F16" else SIZE)
            context = Context(model, cells=SIZE, sequences=1, settings=settings, scored=SIZE)
            contexts[name] = stack.enter_context(contextlib.closing(context))
        f16, q3 = contexts.values()
        chunks = cut_chunks(Tokenizer(f16._model).encode(evaluation_text()), SIZE, 4)
        with writing(log_probs, chunks, f16._model.vocab_size) as keep:
            base = evaluate(f16, chunks, bos=None, keep=keep)
        quality = evaluate(q3, chunks, bos=None, reference=np.load(log_probs, mmap_mode="r"))
        yield Measured(contexts, chunks, log_probs, base, quality)


def log_probabilities(model: Model, chunk: NDArray[np.int32]) -> NDArray[np.float64]:
    """Evaluate a chunk at once, and return float64 log-probabilities of all positions."""
    settings = EngineSettings(model.path, threads=1, batch_size=SIZE)
    context = Context(model, cells=SIZE, sequences=1, settings=settings, scored=SIZE)
    context.tokens[:], context.positions[:] = chunk, np.arange(SIZE)
    context.seq_ids[:], context.wants_logits[:] = 0, 1
    logits = context.decode(SIZE, SIZE).astype(np.float64)
    context.close()
    top = logits.max(1, keepdims=True)
    result: NDArray[np.float64] = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    return result


def test_the_figures_are_those_of_their_definitions(measured: Measured) -> None:
    losses: dict[str, list[float]] = {name: [] for name in KINDS}
    divergences, same, clipped = [], [], []
    for chunk in measured.chunks:
        found = {name: log_probabilities(one._model, chunk) for name, one in measured.contexts.items()}
        for position in range(SIZE // 2, SIZE - 1):
            for name in found:
                losses[name].append(-found[name][position, chunk[position + 1]])
            base, other = found["F16"][position], found["Q3_K_S"][position]
            clipped.append(min(losses["F16"][-1], 16 - base.max()))
            divergences.append(float((np.exp(base) * (base - other)).sum()))
            same.append(base.argmax() == other.argmax())
    base_quality, quality = measured.base, measured.quality
    assert base_quality.divergence is None
    assert quality.divergence is not None
    assert quality.positions == base_quality.positions == len(divergences) == 4 * 63
    # Batches of other sizes are computed by other kernels, which round otherwise, some of them in F16.
    assert base_quality.perplexity == pytest.approx(np.exp(np.mean(losses["F16"])), rel=5e-3)
    assert quality.perplexity == pytest.approx(np.exp(np.mean(losses["Q3_K_S"])), rel=5e-3)
    spread = np.std(losses["Q3_K_S"], ddof=1) / np.sqrt(len(divergences))
    assert quality.perplexity_error == pytest.approx(quality.perplexity * spread, rel=5e-3)
    ratios = np.subtract(losses["Q3_K_S"], clipped)
    # What lies 16 nats below the top counts for that much, and the file's steps are 2.4e-4 wide.
    assert quality.divergence.mean == pytest.approx(np.mean(divergences), rel=5e-3, abs=1e-3)
    assert quality.divergence.p99 == pytest.approx(np.percentile(divergences, 99), rel=5e-3, abs=1e-3)
    assert quality.divergence.same_top == pytest.approx(np.mean(same), abs=2 / len(same))
    assert quality.divergence.log_ratio == pytest.approx(ratios.mean(), abs=5e-3)
    assert quality.divergence.log_ratio_error == pytest.approx(np.std(ratios, ddof=1) / np.sqrt(len(ratios)), rel=5e-3)
    assert quality.divergence.mean > 1e-3


def test_the_reference_is_as_far_from_itself_as_its_file_rounds(measured: Measured) -> None:
    rows = np.load(measured.log_probs)
    assert rows.shape == (len(measured.chunks) * scored_positions(SIZE),)
    again = evaluate(measured.contexts["F16"], measured.chunks, bos=None, reference=rows)
    assert again.perplexity == measured.base.perplexity
    assert again.divergence is not None
    assert abs(again.divergence.mean) < 1e-5
    assert again.divergence.same_top > 0.99


def test_a_chunks_first_token_is_replaced_by_bos_where_the_vocabulary_adds_one(measured: Measured) -> None:
    context, chunks, bos = measured.contexts["F16"], measured.chunks, measured.contexts["F16"]._model.bos_token_id
    replaced = chunks.copy()
    replaced[:, 0] = bos
    given = [(chunks, bos), (replaced, None), (chunks, None)]
    first, second, third = (evaluate(context, tokens, bos=token).perplexity for tokens, token in given)
    assert first == second != third


def test_logits_that_are_no_numbers_are_refused(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = np.full((63, 9), np.nan, np.float32)
    monkeypatch.setattr(quality_module, "feed", lambda *_: [(0, broken)])
    with pytest.raises(BenchError, match="NaN"):
        evaluate(measured.contexts["F16"], measured.chunks % 9, bos=None)


def test_a_text_is_cut_into_whole_chunks_or_refused() -> None:
    for count, size, words in ((255, 128, "two chunks of 128"), (100, 3, "too small")):
        with pytest.raises(BenchError, match=words):
            cut_chunks(np.zeros(count, np.int32), size)
    tokens = np.arange(29, dtype=np.int32)
    assert cut_chunks(tokens, 8).tolist() == tokens[:24].reshape(3, 8).tolist()
    assert cut_chunks(tokens, 8, 2).shape == (2, 8)


def test_no_sentence_of_the_evaluation_text_is_in_the_calibration_text() -> None:
    evaluation = {line for line in evaluation_text().splitlines() if len(line) > 30}
    assert len(evaluation) > 100
    assert not evaluation & set(calibration_text().splitlines())
