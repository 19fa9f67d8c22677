"""How well a model predicts a text, and how far its predictions are from another's.

Chunks, scored positions and statistics are those of llama.cpp's ``tools/perplexity``: the text is cut into chunks of
`ctx_size` tokens, each evaluated for itself, and the tokens of a chunk's second half are scored, so that each has half
a chunk in front of it at least. What fills no chunk is left out.

The reference's log-probabilities lie in an .npy file, rounded as llama-perplexity rounds them: to 65,535 steps between
a position's likeliest token and what is 16 nats below it, or its least likely. So steps are 0.00024 nats at most, whose
errors cancel out in means, and a chunk of 512 tokens of Phi-3's vocabulary takes 16 MB.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3.bench import BenchError
from edge_phi3.files import atomic_output
from edge_phi3.llama.context import Context

Keep = Callable[[NDArray[np.float64]], object]
"""Takes log-probabilities, shape ``(rows, vocab_size)``."""

_TAIL, _STEPS = 16, 65535
"""Nats below the most likely token beyond which tokens are not told apart, and the steps down to there."""

_ROWS = 32
"""Positions that are computed together: 8 MB of float64 for Phi-3's vocabulary."""


class Divergence(msgspec.Struct, frozen=True):
    """How far predictions are from a reference's at the same positions, each mean with its standard error.

    `mean` is the Kullback-Leibler divergence in nats, as are its percentiles, and `same_top` the share of positions
    at which both find the same token the most likely. `log_ratio` is the logarithm of perplexity over the reference's,
    where, as in llama-perplexity, no token of the reference is less likely than 16 nats below the top; its error is
    smaller than the perplexities' own, since both meet the same text.
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
    """How well a text is predicted, at so many scored positions.

    The perplexity is the exponential of the mean negative log-likelihood of the tokens, with its standard error. The
    reference itself has no divergence.
    """

    chunks: int
    positions: int
    perplexity: float
    perplexity_error: float
    divergence: Divergence | None


def cut_chunks(tokens: NDArray[np.int32], ctx_size: int, chunks: int | None = None) -> NDArray[np.int32]:
    """Return the chunks of a text's tokens, shape ``(chunks, ctx_size)``, all or so many at most, of two at least."""
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


def _row_type(vocab_size: int) -> np.dtype[np.void]:
    """Return what a position is stored as: a token's log-probability is ``scale * steps + lowest``."""
    return np.dtype([("scale", "<f4"), ("lowest", "<f4"), ("steps", "<u2", (vocab_size,))])


def _rounded(log_probs: NDArray[np.float64]) -> NDArray[np.void]:
    rows = np.empty(len(log_probs), _row_type(log_probs.shape[1]))
    top = log_probs.max(axis=1)
    rows["lowest"] = np.maximum(log_probs.min(axis=1), top - _TAIL)
    rows["scale"] = (top - rows["lowest"]) / _STEPS
    scale = np.where(rows["scale"] > 0, rows["scale"], 1)[:, None]
    rows["steps"] = np.rint((log_probs - rows["lowest"][:, None]) / scale).clip(0, _STEPS)
    return rows


def _read(rows: NDArray[np.void]) -> NDArray[np.float64]:
    scale, lowest = (rows[name].astype(np.float64)[:, None] for name in ("scale", "lowest"))
    read: NDArray[np.float64] = rows["steps"] * scale + lowest
    return read


@contextlib.contextmanager
def writing(path: Path, chunks: NDArray[np.int32], vocab_size: int) -> Iterator[Keep]:
    """Write a reference's log-probabilities, whole or not at all; yield what takes them in the order of positions."""
    shape = (len(chunks) * scored_positions(chunks.shape[1]),)
    descr = np.lib.format.dtype_to_descr(_row_type(vocab_size))
    with atomic_output(path, force=True) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        yield lambda log_probs: file.write(_rounded(log_probs).tobytes())


def evaluate(
    context: Context,
    chunks: NDArray[np.int32],
    *,
    bos: int | None,
    keep: Keep = lambda _: None,
    reference: NDArray[np.void] | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> Quality:
    """Evaluate chunks of a text, shape ``(chunks, ctx_size)``, and compare with a reference position by position.

    The context has as many cells as a chunk has tokens, whose first is replaced by `bos`, unless the vocabulary adds
    none. `keep` takes the log-probabilities of the scored positions, a few rows at a time; `reference` are the records
    that `writing` made of another model's, shape ``(positions,)``. `done` is called with the number of chunks so far.
    """
    losses: list[NDArray[np.float64]] = []
    compared: list[NDArray[np.float64]] = []
    at = 0
    for log_probs, following in _scored(context, chunks, bos, done):
        losses.append(-log_probs[np.arange(len(following)), following])
        keep(log_probs)
        if reference is not None:
            compared.append(_compare(log_probs, _read(reference[at : at + len(following)]), following))
        at += len(following)
    loss = np.concatenate(losses)
    mean, error = _mean_and_error(loss)
    if not np.isfinite(mean):
        raise BenchError("The model gives logits that are NaN or infinite; it cannot be measured.")
    perplexity = float(np.exp(mean))
    return Quality(
        chunks=len(chunks),
        positions=len(loss),
        perplexity=perplexity,
        perplexity_error=perplexity * error,
        divergence=_divergence(*np.concatenate(compared, axis=1)) if compared else None,
    )


def _compare(
    log_probs: NDArray[np.float64], base: NDArray[np.float64], following: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return the divergence of each position, whether both have the same top token, and the loss over the base's."""
    # llama-perplexity passes over the far tail.
    weights = np.where(base > -_TAIL, np.exp(base), 0)
    divergences = np.einsum("ij,ij->i", weights, base - log_probs)
    picked = np.arange(len(following)), following
    return np.stack([divergences, base.argmax(axis=1) == log_probs.argmax(axis=1), base[picked] - log_probs[picked]])


def _divergence(divergences: NDArray[np.float64], same: NDArray[np.float64], ratios: NDArray[np.float64]) -> Divergence:
    figures: list[float] = [*_mean_and_error(divergences), *np.percentile(divergences, [50, 99, 100]).tolist()]
    # The error of a mean of differences is that of the two means with their covariance taken into account.
    figures += _mean_and_error(same) + _mean_and_error(ratios)
    return Divergence(*figures)


def scored_positions(ctx_size: int) -> int:
    """Return the number of scored positions of a chunk: its second half but the last, whose successor is unknown."""
    return ctx_size - 1 - ctx_size // 2


def _scored(
    context: Context, chunks: NDArray[np.int32], bos: int | None, done: Callable[[int], None]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int32]]]:
    """Yield log-probabilities of scored positions, a few rows at a time, and the token that follows each."""
    size = chunks.shape[1]
    scored = np.zeros(size, np.bool_)
    scored[size // 2 : size // 2 + scored_positions(size)] = True
    for number, chunk in enumerate(chunks, start=1):
        fed = chunk.copy()
        if bos is not None:
            fed[0] = bos
        for start, logits in feed(context, fed, scored):
            positions = start + np.flatnonzero(scored[start : start + context.batch_size])
            for row in range(0, len(positions), _ROWS):
                part = logits[row : row + _ROWS].astype(np.float64)
                part -= part.max(axis=1, keepdims=True)
                yield part - np.log(np.exp(part).sum(axis=1, keepdims=True)), chunk[positions[row : row + _ROWS] + 1]
        done(number)


def feed(
    context: Context, tokens: NDArray[np.int32], wanted: NDArray[np.bool_]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Decode one sequence, shape ``(length,)``, in an emptied context that has room for it.

    Yield for each batch its first position and the logits of its `wanted` positions, valid until the next one.
    """
    context.clear()
    for start in range(0, len(tokens), context.batch_size):
        part = slice(start, start + context.batch_size)
        count = len(tokens[part])
        context.tokens[:count] = tokens[part]
        context.positions[:count] = np.arange(start, start + count)
        context.seq_ids[:count] = 0
        context.wants_logits[:count] = wanted[part]
        yield start, context.decode(count, int(np.count_nonzero(wanted[part])))


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and its standard error, as llama-perplexity computes them."""
    mean = values.mean()
    variance = (values**2).mean() - mean**2
    return float(mean), float(np.sqrt(max(variance, 0.0) / max(1, len(values) - 1)))
