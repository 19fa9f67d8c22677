"""Perplexity and divergence against their definitions in float64; tests/parity asks llama-perplexity itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.logits_file import LogitsFile, compress, scored_positions, writing
from edge_phi3.bench.quality import Quality, compare, cut_chunks, record
from edge_phi3.bench.quants import evaluation_text
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import calibration_text
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model

SIZE = 128
STEP = 16 / 65535
"""Between two log-probabilities that a file tells apart, at most."""


@dataclasses.dataclass
class Loaded:
    """A type of the demo model, ready to evaluate chunks."""

    model: Model
    context: Context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quality")
    source = convert(DEMO_CHECKPOINT, folder / "demo-F16.gguf", outtype="f16").path
    return {"F16": source, "Q3_K_S": quantize(source, folder / "demo-Q3_K_S.gguf", type="Q3_K_S").path}


@pytest.fixture(scope="module")
def loaded(files: dict[str, Path]) -> Iterator[dict[str, Loaded]]:
    result = {}
    for name, path in files.items():
        model = Model(path, n_gpu_layers=0)
        # F16 takes two batches a chunk: the second half begins inside the one and goes on in the other. With quantised
        # weights batches of other sizes round otherwise.
        settings = EngineSettings(path, threads=1, batch_size=80 if name == "F16" else SIZE)
        result[name] = Loaded(model, Context(model, cells=SIZE, sequences=1, settings=settings))
    yield result
    for one in result.values():
        one.context.close()
        one.model.close()


@pytest.fixture(scope="module")
def chunks(loaded: dict[str, Loaded]) -> NDArray[np.int32]:
    return cut_chunks(Tokenizer(loaded["F16"].model).encode(evaluation_text()), SIZE, 4)


@pytest.fixture(scope="module")
def measured(
    loaded: dict[str, Loaded], chunks: NDArray[np.int32], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Quality, Quality, LogitsFile]:
    """The reference's quality, that of Q3_K_S, and the file between them."""
    path = tmp_path_factory.mktemp("logits") / "reference.logits"
    with writing(path, chunks, loaded["F16"].model.vocab_size) as writer:
        base = record(loaded["F16"].context, chunks, writer, bos=None, done=lambda _: None)
    reference = LogitsFile.open(path)
    return base, compare(loaded["Q3_K_S"].context, reference, bos=None, done=lambda _: None), reference


def log_probabilities(model: Model, chunk: NDArray[np.int32]) -> NDArray[np.float64]:
    """Evaluate a chunk at once, and give float64 log-probabilities of all positions."""
    settings = EngineSettings(model.path, threads=1, batch_size=SIZE)
    context = Context(model, cells=SIZE, sequences=1, settings=settings)
    context.tokens[:], context.positions[:] = chunk, np.arange(SIZE)
    context.seq_ids[:], context.wants_logits[:] = 0, 1
    logits = context.decode(SIZE, SIZE).astype(np.float64)
    context.close()
    top = logits.max(1, keepdims=True)
    result: NDArray[np.float64] = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    return result


def test_the_figures_are_those_of_their_definitions(
    loaded: dict[str, Loaded], chunks: NDArray[np.int32], measured: tuple[Quality, Quality, LogitsFile]
) -> None:
    losses, divergences, same = {"F16": [], "Q3_K_S": []}, [], []
    clipped = []
    for chunk in chunks:
        found = {name: log_probabilities(one.model, chunk) for name, one in loaded.items()}
        for position in range(SIZE // 2, SIZE - 1):
            for name in found:
                losses[name].append(-found[name][position, chunk[position + 1]])
            base, other = found["F16"][position], found["Q3_K_S"][position]
            clipped.append(min(losses["F16"][-1], 16 - base.max()))
            divergences.append(float((np.exp(base) * (base - other)).sum()))
            same.append(base.argmax() == other.argmax())
    base_quality, quality, _ = measured
    assert base_quality.divergence is None
    assert quality.divergence is not None
    assert quality.positions == base_quality.positions == len(divergences) == 4 * 63
    # Batches of other sizes are computed by other kernels, which round otherwise, some of them in F16.
    assert base_quality.perplexity == pytest.approx(np.exp(np.mean(losses["F16"])), rel=5e-3)
    assert quality.perplexity == pytest.approx(np.exp(np.mean(losses["Q3_K_S"])), rel=5e-3)
    spread = np.std(losses["Q3_K_S"], ddof=1) / np.sqrt(len(divergences))
    assert quality.perplexity_error == pytest.approx(quality.perplexity * spread, rel=5e-3)
    ratios = np.subtract(losses["Q3_K_S"], clipped)
    found_divergence = quality.divergence
    # Each log-probability of the file is off by half a step at most, and so is their mean by any weights.
    assert found_divergence.mean == pytest.approx(np.mean(divergences), rel=5e-3, abs=STEP)
    assert found_divergence.p99 == pytest.approx(np.percentile(divergences, 99), rel=5e-3, abs=STEP)
    assert found_divergence.same_top == pytest.approx(np.mean(same), abs=2 / len(same))
    assert found_divergence.log_ratio == pytest.approx(ratios.mean(), abs=5e-3)
    assert found_divergence.log_ratio_error == pytest.approx(np.std(ratios, ddof=1) / np.sqrt(len(ratios)), rel=5e-3)
    assert found_divergence.mean > 1e-3


def test_the_reference_is_as_far_from_itself_as_its_file_rounds(
    loaded: dict[str, Loaded], measured: tuple[Quality, Quality, LogitsFile]
) -> None:
    base, _, reference = measured
    again = compare(loaded["F16"].context, reference, bos=None, done=lambda _: None)
    assert again.perplexity == base.perplexity
    assert again.divergence is not None
    assert abs(again.divergence.mean) < 1e-5
    assert again.divergence.same_top > 0.99


def test_a_chunks_first_token_is_replaced_by_bos_where_the_vocabulary_adds_one(
    loaded: dict[str, Loaded], chunks: NDArray[np.int32], tmp_path: Path
) -> None:
    one = loaded["F16"]
    replaced = chunks.copy()
    replaced[:, 0] = one.model.bos_token_id
    results = []
    for index, (tokens, bos) in enumerate([(chunks, one.model.bos_token_id), (replaced, None), (chunks, None)]):
        with writing(tmp_path / str(index), tokens, one.model.vocab_size) as writer:
            results.append(record(one.context, tokens, writer, bos=bos, done=lambda _: None).perplexity)
    assert results[0] == results[1] != results[2]


def test_log_probabilities_come_back_from_the_file_to_within_its_steps(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    logits = (4 * random.standard_normal((6, 33))).astype(np.float32)
    logits[2, 7] = logits[2].max() + 30  # all others are more than 16 nats below
    logits[3] = 1.25
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    assert scored_positions(5) * 2 == 4
    with writing(tmp_path / "a", tokens, 33) as writer:
        writer.write(logits[:3])
        writer.write(logits[3:4])
    read = LogitsFile.open(tmp_path / "a")
    assert read.tokens.tolist() == tokens.tolist()
    exact = logits[:4].astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    exact = np.maximum(exact, exact.max(1, keepdims=True) - 16)
    assert read.rows(0, 4) == pytest.approx(exact, abs=16 / 65535)
    assert read.rows(1, 2).tolist() == read.rows(0, 4)[1:2].tolist()


def test_what_is_not_a_whole_file_is_refused(tmp_path: Path) -> None:
    tokens = np.zeros((1, 8), np.int32)
    with writing(tmp_path / "good", tokens, 10) as writer:
        writer.write(np.zeros((3, 10), np.float32))
    data = (tmp_path / "good").read_bytes()
    assert LogitsFile.open(tmp_path / "good").vocab_size == 10
    for name, content in {
        "cut": data[:-1],
        "longer": data + b"\0",
        "magic": b"x" + data[1:],
        "short": data[:12],
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BenchError, match=r"not whole|not a file of log-probabilities"):
            LogitsFile.open(tmp_path / name)
    with pytest.raises(BenchError, match="cannot be read"):
        LogitsFile.open(tmp_path / "absent")


def test_logits_that_are_no_numbers_are_refused() -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = np.nan
    with pytest.raises(BenchError, match="NaN"):
        compress(logits)


@pytest.mark.parametrize(("count", "size", "words"), [(255, 128, "two chunks of 128"), (100, 3, "too small")])
def test_a_text_that_cannot_be_scored_is_refused(count: int, size: int, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        cut_chunks(np.zeros(count, np.int32), size)


def test_what_fills_no_chunk_is_left_out() -> None:
    tokens = np.arange(29, dtype=np.int32)
    assert cut_chunks(tokens, 8).tolist() == tokens[:24].reshape(3, 8).tolist()
    assert cut_chunks(tokens, 8, 2).shape == (2, 8)


def test_the_evaluation_text_is_not_the_calibration_text() -> None:
    """No sentence of one stands in the other."""
    evaluation = {line for line in evaluation_text().splitlines() if len(line) > 30}
    assert len(evaluation) > 100
    assert not evaluation & set(calibration_text().splitlines())
