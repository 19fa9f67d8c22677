"""The cases of Phi-3's attention beyond its window and its original context, shared by recorder and tests.

``attention.json`` holds the greedy continuation of each case's random prompt.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.golden.checkpoints import longrope, write_checkpoint

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
        """What the case is called in the recorded file."""
        return f"{self.model}-{self.prompt_length}+{self.new_tokens}"

    def prompt(self) -> NDArray[np.int32]:
        """Return the prompt's token ids, int32, shape ``(prompt_length,)``."""
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
    options: dict[str, Any] = {}
    if model == "wide":
        return write_checkpoint(folder, seed=7, hidden_size=256, intermediate_size=512, heads=4, layers=2)
    if model == "128k":
        options = {
            "max_position_embeddings": 131072,
            "sliding_window": 262144,
            "rope_scaling": longrope(HEAD_SIZE),
        }
    return write_checkpoint(folder, seed=7, hidden_size=64, heads=64 // HEAD_SIZE, layers=2, **options)


def recorded() -> dict[str, list[int]]:
    """Read what transformers generated, by case name."""
    tokens: dict[str, list[int]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return tokens
