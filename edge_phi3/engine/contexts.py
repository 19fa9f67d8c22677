"""Which contexts of llama.cpp a model is served with: pure arithmetic, shared with those who plan memory."""

from __future__ import annotations

from dataclasses import dataclass

from edge_phi3.engine.settings import DEFAULT_CTX_SIZE, EngineSettings

MAX_PARALLEL = 255
"""Sequences that one llama.cpp context decodes together at most: it has 256 ids (LLAMA_MAX_SEQ), one is kept back."""


@dataclass(frozen=True, slots=True)
class ContextShape:
    """One context.

    Attributes:
        cells: KV cells in all.
        sequences: how many sequence ids there are.
        unified: one cache that all sequences share, or one part of ``cells / sequences`` for each.
        max_tokens: how long its sequences may get; None for as long as its cells allow.
    """

    cells: int
    sequences: int
    unified: bool
    max_tokens: int | None


def context_shapes(settings: EngineSettings, context_length: int, original: int | None) -> list[ContextShape]:
    """Give the contexts to make: one, or for Phi-3-128k two, the first for sequences up to the original context.

    Args:
        settings: how many cells are asked for, and how many sequences at once.
        context_length: tokens that the model was trained for.
        original: the context beyond which the long rotary factors hold; None for a model without them.
    """
    parallel = min(settings.parallel, MAX_PARALLEL)
    cells = settings.ctx_size or min(context_length, DEFAULT_CTX_SIZE)
    if original is None or cells <= original:
        return [ContextShape(cells, parallel, unified=settings.kv_unified or parallel == 1, max_tokens=None)]
    # llama.cpp chooses the rotary factors once a context, by its cells per sequence. Short prompts need a context of
    # their own, whose sequences have `original` cells each; it takes as much memory as the long one at most.
    streams = max(1, min(parallel, cells // original))
    return [
        ContextShape(original * streams, streams, unified=False, max_tokens=original)
        if streams > 1
        else ContextShape(original, parallel, unified=True, max_tokens=original),
        ContextShape(cells, parallel, unified=True, max_tokens=None),
    ]
