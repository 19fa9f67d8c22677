"""Greedy continuations of random prompts, shared by recorder and tests: every kind of attention that a Phi-3 has.

Beyond the window and the original context, with shared key-value heads, with tied embeddings; ``attention.json`` holds
the tokens of each case.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.golden.checkpoints import long_context, write_checkpoint
from tests.golden.family import FAMILY

GOLDEN = Path(__file__).with_name("attention.json")
FIRST_TOKEN, LAST_TOKEN = 259, 500
"""Prompts are drawn from ordinary tokens: no byte and no special one among them, in either vocabulary."""

MODELS: dict[str, dict[str, Any]] = {
    "4k": {},
    "128k": long_context(),
    "gqa": {"kv_heads": 2},
    "tied": {"tie_word_embeddings": True, "gain": 3.0},
    "wide": {"hidden_size": 256, "intermediate_size": 512},
    "phi-3.5-mini": FAMILY["phi-3.5-mini-instruct"],
    "phi-3-medium-4k": FAMILY["phi-3-medium-4k-instruct"],
    "phi-3-medium-128k": FAMILY["phi-3-medium-128k-instruct"],
    "phi-4-mini": FAMILY["phi-4-mini-instruct"],
    "phi-4": FAMILY["phi-4"],
}
"""What `write_checkpoint` makes each model with; the rows of "wide" fill blocks of k-quants."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt of `prompt_length` tokens and how far it is continued, past every end token.

    `from_scratch` is whether the reference computes each step anew, without a cache.
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
    Case("gqa", 300, 24),
    Case("tied", 300, 24),
    Case("phi-3.5-mini", 100, 24),
    Case("phi-3.5-mini", 6000, 24),
    Case("phi-3-medium-4k", 2500, 24),
    Case("phi-3-medium-128k", 100, 24),
    Case("phi-3-medium-128k", 6000, 24),
    Case("phi-4-mini", 100, 24),
    Case("phi-4-mini", 6000, 24),
    Case("phi-4-mini", 4085, 32, from_scratch=True),
    Case("phi-4", 300, 24),
    Case("phi-4", 6000, 24),
)


def write_model(folder: Path, model: str) -> Path:
    return write_checkpoint(folder, seed=7, **MODELS[model])


def recorded() -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return tokens
