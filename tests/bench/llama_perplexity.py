"""What llama-perplexity does with a model's logits, written anew from its C++ (llama.cpp's ``tools/perplexity``).

Its own program is compared by ``benchmarks/perplexity_parity.py``, on one machine at a time: the kernels of other
processors round otherwise, and so no figure that it printed there can be asked for here. What it does after the logits
can.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HEAD = 4
"""uint16 words in front of the vocabulary's: scale and minimum, two float32."""


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Pack one position: ``log_softmax(n_vocab, logits, log_prob, tok)``."""
    top = logits.max()
    least = max(logits.min(), top - np.float32(16))
    total = np.float32(np.log(np.exp(logits - top).astype(np.float64).sum()))
    scale = (top - least) / np.float32(65535)
    packed = np.zeros(HEAD + len(logits) + len(logits) % 2, np.uint16)
    packed[:HEAD] = np.array([scale, least - top - total], np.float32).view(np.uint16)
    if scale:
        inverse = np.float32(1) / scale
        packed[HEAD : HEAD + len(logits)] = np.where(logits > least, np.rint(inverse * (logits - least)), 0)
    return packed


class Base:
    """A file of ``--kl-divergence-base``: what was evaluated, and its log-probabilities."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        assert content[:8] == b"_logits_"
        self.n_ctx, self.n_vocab, self.n_chunk = np.frombuffer(content, "<i4", 3, 8).tolist()
        self.tokens = np.frombuffer(content, "<i4", self.n_ctx * self.n_chunk, 20).reshape(self.n_chunk, self.n_ctx)
        width = 2 * ((self.n_vocab + 1) // 2) + 4
        self.packed = np.frombuffer(content, "<u2", offset=20 + 4 * self.tokens.size).reshape(-1, width)
        assert len(self.packed) == self.n_chunk * (self.n_ctx - 1 - self.n_ctx // 2)


def kl_divergence(base: Base, logits: list[NDArray[np.float32]]) -> dict[str, float]:
    """Compare a model with a base: ``kl_divergence``, under the names of our own figures.

    Args:
        base: the file.
        logits: the model's, of each chunk's scored positions, shape (n_ctx - 1 - n_ctx // 2, n_vocab).
    """
    first = base.n_ctx // 2
    nll, nll_base, kld, same = [], [], [], 0
    rows = iter(base.packed)
    for tokens, chunk in zip(base.tokens, logits, strict=True):
        for position in range(base.n_ctx - 1 - first):
            packed, row, token = next(rows), chunk[position], tokens[first + position + 1]
            top = row.max()
            total = np.float32(np.log(np.exp(row - top).astype(np.float64).sum()))
            scale, least = packed[:HEAD].copy().view(np.float32)
            log_base = scale * packed[HEAD : HEAD + base.n_vocab].astype(np.float32) + least
            nll.append(top + total - row[token])
            nll_base.append(-log_base[token])
            terms = np.exp(log_base) * (log_base - row + (top + total))
            kld.append(terms[log_base > -16].astype(np.float64).sum())
            same += int(row.argmax() == log_base.argmax())
    return _figures(np.array(nll, np.float64), np.array(nll_base, np.float64), np.array(kld), same)


def _figures(
    nll: NDArray[np.float64], nll_base: NDArray[np.float64], kld: NDArray[np.float64], same: int
) -> dict[str, float]:
    count = len(kld)

    def mean_and_uncertainty(values: NDArray[np.float64]) -> tuple[float, float]:
        mean = values.sum() / count
        spread = (values**2).sum() / count - mean * mean
        return float(mean), float(np.sqrt(spread / (count - 1))) if spread > 0 and count > 10 else 0.0

    (log_ppl, error), (log_ppl_base, error_base) = mean_and_uncertainty(nll), mean_and_uncertainty(nll_base)
    covariance = ((nll * nll_base).sum() / count - nll.sum() / count * nll_base.sum() / count) / (count - 1)
    ordered = np.sort(kld.astype(np.float32))
    place = np.float32(0.99) * np.float32(count - 1)
    below = int(place)
    part = place - np.float32(below)
    middle = ordered[count // 2]
    if count % 2 == 0:
        middle = np.float32(0.5) * (middle + ordered[count // 2 - 1])
    mean, mean_error = mean_and_uncertainty(kld)
    return {
        "perplexity": float(np.exp(log_ppl)),
        "perplexity_error": float(np.exp(log_ppl)) * error,
        "log_ratio": log_ppl - log_ppl_base,
        "log_ratio_error": float(np.sqrt(error**2 + error_base**2 - 2 * covariance)),
        "mean": mean,
        "error": mean_error,
        "median": float(middle),
        "p99": float((1 - part) * ordered[below] + part * ordered[min(below + 1, count - 1)]),
        "same_top": same / count,
    }
