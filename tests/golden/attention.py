"""The cases of Phi-3's attention beyond its window and its original context, shared by recorder and tests.

``attention.json`` holds the greedy continuation of each case's random prompt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.golden.checkpoints import long_context, write_checkpoint

GOLDEN = Path(__file__).with_name("attention.json")
HEAD_SIZE = 16
FIRST_TOKEN, LAST_TOKEN = 259, 500
"""Prompts are drawn from ordinary pieces: no byte and no special token among them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and how far it is continued.

    Attributes:
        model: "4k" or "128k".
        prompt_length: tokens of the prompt.
        new_tokens: tokens generated, greedily, with no end token.
        from_scratch: whether the reference computes each step anew, without a cache.
    """

    model: str
    prompt_length: int
    new_tokens: int
    from_scratch: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.prompt_length}+{self.new_tokens}"

    def prompt(self) -> NDArray[np.int32]:
        random = np.random.Generator(np.random.PCG64([self.prompt_length, self.model == "4k"]))
        return random.integers(FIRST_TOKEN, LAST_TOKEN, self.prompt_length, dtype=np.int32)


CASES = (
    Case("4k", 40, 24),
    Case("4k", 2030, 48),
    Case("4k", 2500, 24),
    Case("4k", 3000, 24),
    Case("4k", 3500, 24),
    Case("128k", 100, 24),
    Case("128k", 4000, 24),
    Case("128k", 6000, 24),
    Case("128k", 4085, 32, from_scratch=True),
)


def write_model(folder: Path, model: str) -> Path:
    """Write the random checkpoint that cases of `model` run on; "wide" is one whose rows k-quants can take."""
    if model == "wide":
        return write_checkpoint(folder, seed=7, hidden_size=256, intermediate_size=512, heads=4, layers=2)
    return write_checkpoint(folder, seed=7, **(long_context(HEAD_SIZE) if model == "128k" else {}))


def recorded() -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return tokens
