"""How well a model predicts a text, and how far its predictions are from another's.

Chunks, scored positions and statistics are those of llama.cpp's ``tools/perplexity``: the text is cut into chunks of
`ctx_size` tokens, each evaluated for itself, and the tokens of a chunk's second half are scored, so that each has half
a chunk in front of it at least. What fills no chunk is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.logits_file import LogitsFile, LogitsWriter, scored_positions
from edge_phi3.llama.context import Context

ChunkDone = Callable[[int], None]

_ROWS = 32
"""Positions that are computed together: 8 MB of float64 for Phi-3's vocabulary."""


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """How far predictions are from a reference's at the same positions.

    Attributes:
        mean: mean Kullback-Leibler divergence from the reference, in nats.
        error: standard error of the mean.
        median: of all positions.
        p99: 99th percentile.
        max: the largest.
        same_top: share of positions at which both find the same token the most likely.
        same_top_error: its standard error.
        log_ratio: logarithm of perplexity over the reference's perplexity. As in llama-perplexity, the reference's is
            that of the file, where no token is less likely than 16 nats below the top; on a text that the model is at a
            loss with, compare the perplexities themselves.
        log_ratio_error: its standard error; smaller than the perplexities' own, since both meet the same text.
    """

    mean: float
    error: float
    median: float
    p99: float
    max: float
    same_top: float
    same_top_error: float
    log_ratio: float
    log_ratio_error: float


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """How well a text is predicted.

    Attributes:
        chunks: how many were evaluated.
        positions: how many tokens were scored.
        perplexity: exponential of the mean negative log-likelihood of the tokens.
        perplexity_error: its standard error.
        divergence: from the reference; None for the reference itself.
    """

    chunks: int
    positions: int
    perplexity: float
    perplexity_error: float
    divergence: Divergence | None


def cut_chunks(tokens: NDArray[np.int32], ctx_size: int, chunks: int | None = None) -> NDArray[np.int32]:
    """Cut tokens into chunks, shape ``(chunks, ctx_size)``.

    Args:
        tokens: of the whole text.
        ctx_size: tokens of a chunk.
        chunks: how many to take at most; None takes all.

    Raises:
        BenchError: the text does not fill two chunks, or a chunk is too small to score anything.
    """
    if ctx_size < 4:
        raise BenchError(f"--ctx-size {ctx_size} is too small; give 4 tokens at least.")
    if len(tokens) < 2 * ctx_size:
        raise BenchError(
            f"The text has {len(tokens)} tokens, and two chunks of {ctx_size} are needed at least;"
            " give a longer text or a smaller --ctx-size."
        )
    count = len(tokens) // ctx_size
    count = count if chunks is None else min(count, chunks)
    return tokens[: count * ctx_size].reshape(count, ctx_size)


def record(
    context: Context, chunks: NDArray[np.int32], writer: LogitsWriter, *, bos: int | None, done: ChunkDone
) -> Quality:
    """Evaluate a text with the reference model, and keep its log-probabilities.

    Args:
        context: of the reference, with as many cells as a chunk has tokens.
        chunks: shape ``(chunks, ctx_size)``.
        writer: where the log-probabilities go.
        bos: the token that each chunk's first is replaced by; None where the vocabulary adds none.
        done: called after each chunk with the number of chunks so far.
    """
    losses: list[NDArray[np.float64]] = []
    for logits, following in _scored(context, chunks, bos, done):
        writer.write(logits)
        losses.append(_normalisers(logits) - logits[np.arange(len(logits)), following])
    return _quality(chunks, np.concatenate(losses), None)


def compare(context: Context, reference: LogitsFile, *, bos: int | None, done: ChunkDone) -> Quality:
    """Evaluate the reference's text with another model, and compare position by position.

    Args:
        context: of the other model, with as many cells as a chunk has tokens.
        reference: the reference's log-probabilities.
        bos: as in `record`.
        done: as in `record`.
    """
    losses: list[NDArray[np.float64]] = []
    expected: list[NDArray[np.float64]] = []
    divergences: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    at = 0
    for logits, following in _scored(context, reference.tokens, bos, done):
        base = reference.rows(at, at + len(logits))
        at += len(logits)
        picked = np.arange(len(logits)), following
        normalisers = _normalisers(logits)
        losses.append(normalisers - logits[picked])
        expected.append(-base[picked].astype(np.float64))
        # The far tail is not told apart in the file, and llama-perplexity passes over it as well.
        weights = np.where(base > -16, np.exp(base, dtype=np.float64), 0)
        differences = base - (logits - normalisers[:, None])
        divergences.append(np.einsum("ij,ij->i", weights, differences))
        same.append(base.argmax(axis=1) == logits.argmax(axis=1))
    loss, base_loss = np.concatenate(losses), np.concatenate(expected)
    return _quality(
        reference.tokens, loss, _divergence(loss, base_loss, np.concatenate(divergences), np.concatenate(same))
    )


def _scored(
    context: Context, chunks: NDArray[np.int32], bos: int | None, done: ChunkDone
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Return logits of scored positions, a few rows at a time, and the token that follows each."""
    size = chunks.shape[1]
    first, last = size // 2, size // 2 + scored_positions(size)
    for number, chunk in enumerate(chunks, start=1):
        context.clear()
        for start in range(0, size, context.batch_size):
            count = min(context.batch_size, size - start)
            positions = np.arange(start, start + count, dtype=np.int32)
            context.tokens[:count] = chunk[start : start + count]
            if bos is not None and start == 0:
                context.tokens[0] = bos
            context.positions[:count] = positions
            context.seq_ids[:count] = 0
            scored = (positions >= first) & (positions < last)
            context.wants_logits[:count] = scored
            logits = context.decode(count, int(np.count_nonzero(scored)))
            following = chunk[positions[scored] + 1]
            for row in range(0, len(following), _ROWS):
                yield logits[row : row + _ROWS], following[row : row + _ROWS]
        done(number)


def _normalisers(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logarithm of each row's sum of exponentials."""
    top = logits.max(axis=1, keepdims=True)
    sums = np.exp(logits - top).sum(axis=1, dtype=np.float64)
    result: NDArray[np.float64] = top[:, 0] + np.log(sums)
    return result


def _quality(chunks: NDArray[np.int32], losses: NDArray[np.float64], divergence: Divergence | None) -> Quality:
    mean, error = _mean_and_error(losses)
    if not np.isfinite(mean):
        raise BenchError("The model gives logits that are NaN or infinite; it cannot be measured.")
    perplexity = float(np.exp(mean))
    return Quality(
        chunks=len(chunks),
        positions=len(losses),
        perplexity=perplexity,
        perplexity_error=perplexity * error,
        divergence=divergence,
    )


def _divergence(
    losses: NDArray[np.float64],
    base_losses: NDArray[np.float64],
    divergences: NDArray[np.float64],
    same: NDArray[np.bool_],
) -> Divergence:
    mean, error = _mean_and_error(divergences)
    median, p99 = np.percentile(divergences, [50, 99]).tolist()
    # The error of a mean of differences is that of the two means with their covariance taken into account.
    log_ratio, log_ratio_error = _mean_and_error(losses - base_losses)
    share = float(same.mean())
    return Divergence(
        mean=mean,
        error=error,
        median=median,
        p99=p99,
        max=float(divergences.max()),
        same_top=share,
        same_top_error=float(np.sqrt(share * (1 - share) / max(1, len(same) - 1))),
        log_ratio=log_ratio,
        log_ratio_error=log_ratio_error,
    )


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and its standard error, as llama-perplexity computes them."""
    mean = values.mean()
    variance = (values**2).mean() - mean**2
    return float(mean), float(np.sqrt(max(variance, 0.0) / max(1, len(values) - 1)))
