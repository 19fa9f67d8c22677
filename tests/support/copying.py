"""A model that copies, made by hand: it goes on as the text went on the last times that its newest token occurred.

It is an induction head (Olsson et al., https://arxiv.org/abs/2209.11895) in Phi-3's architecture. The first layer's
heads look at the token before, whose embedding they add to the residual stream; the second's look for tokens whose
predecessor is the newest token, and add their embeddings, which the output reads. All other weights are zero, so that
a model of any size costs what a trained one of the size costs.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.golden.checkpoints import Tensor, phi3_tensors, write_checkpoint, write_safetensors

_WIDTH = 512
"""Numbers of the embedding of a token, +1 or -1 each; as many hold the token before, and what is to come."""
_NOW, _CONSTANT, _BEFORE, _NEXT = 0, _WIDTH, 2 * _WIDTH, 3 * _WIDTH
"""Where these begin in the residual stream; the constant is 1 for every token."""
_NEAREST = 70.0
_ALIKE = 40.0
"""How sharply heads of the first and of the second layer tell what they look for from the rest."""


@dataclasses.dataclass(frozen=True)
class _CopyingTensor(Tensor):
    """One weight of the model; `sizes` are those of ``write_checkpoint``."""

    heads: int = 1
    hidden: int = 1

    def values(self, seed: int) -> NDArray[np.float32]:
        made = np.zeros(self.shape, np.float32)
        chance = np.random.default_rng(seed)
        signs = chance.choice(np.array([-1, 1], np.float32), (max(self.shape), _WIDTH))
        if self.name.endswith("norm.weight"):
            made[:] = 1
        elif self.name.startswith("model.embed"):
            made[:, :_WIDTH], made[:, _CONSTANT] = signs[: len(made)], 1
        elif self.name.startswith("lm_head"):
            made[:, _NEXT : _NEXT + _WIDTH] = signs[: len(made)]
        elif ".layers.0.self_attn" in self.name or ".layers.1.self_attn" in self.name:
            self._attention(made, chance, first=".layers.0." in self.name)
        return made

    def _attention(self, made: NDArray[np.float32], chance: np.random.Generator, *, first: bool) -> None:
        size, part = self.hidden // self.heads, _WIDTH // self.heads
        target = _BEFORE if first else _NEXT
        # Rotary pairs are numbers i and i + size / 2 of a head, and turn by 10000 ** (-2 i / size) a position.
        half = size // 2
        turns = 10000.0 ** (-np.arange(half) / half)
        for head in range(self.heads):
            query, key, value = (made[at + head * size :][:size] for at in (0, self.hidden, 2 * self.hidden))
            if self.name.endswith("o_proj.weight"):
                rows = slice(target + head * part, target + (head + 1) * part)
                made[rows, head * size : head * size + part] = np.eye(part)
                continue
            value[:part, _NOW + head * part : _NOW + (head + 1) * part] = np.eye(part)
            if first:
                key[:half, _CONSTANT] = 1  # of all keys the one before agrees best with a query turned back by one
                query[:half, _CONSTANT] = _NEAREST * np.cos(turns)
                query[half:, _CONSTANT] = -_NEAREST * np.sin(turns)
            else:
                slow = np.flatnonzero(turns < 1e-3)
                mixed = chance.normal(size=(2 * len(slow), _WIDTH)) / math.sqrt(_WIDTH)
                places = np.concatenate([slow, slow + half])
                query[places, _NOW : _NOW + _WIDTH] = _ALIKE * mixed
                key[places, _BEFORE : _BEFORE + _WIDTH] = mixed


def write_copying_checkpoint(folder: Path, *, hidden_size: int, heads: int, **options: Any) -> Path:
    """Write the model as a checkpoint with its tokenizer; the options are those of ``write_checkpoint``."""
    write_checkpoint(folder, hidden_size=hidden_size, heads=heads, **options)
    sizes = {name: options[name] for name in ("intermediate_size", "layers")}
    rows = options["vocab_size"]
    shapes = phi3_tensors(hidden_size, heads=heads, kv_heads=heads, rows=rows, gain=1.0, **sizes)
    tensors: list[Tensor] = [_CopyingTensor(each.name, each.shape, 0.0, 0.0, heads, hidden_size) for each in shapes]
    write_safetensors(folder / "model.safetensors", tensors, seed=7, dtype=options.get("dtype", "float32"))
    return folder
