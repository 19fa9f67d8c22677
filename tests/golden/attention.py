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
from tests.support.cases import tables

GOLDEN = Path(__file__).with_name("attention.json")
FIRST_TOKEN, LAST_TOKEN = 259, 500
"""Prompts are drawn from ordinary tokens: no byte and no special one among them, in either vocabulary."""

MODELS: dict[str, dict[str, Any]] = {
    **tables(__file__)["MODELS"],
    "128k": long_context(),
    **{name.removesuffix("-instruct"): shape for name, shape in FAMILY.items()},
}
"""What `write_checkpoint` makes each model with."""


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


CASES = [Case(*fields) for fields in tables(__file__)["CASES"]]


def write_model(folder: Path, model: str) -> Path:
    return write_checkpoint(folder, seed=7, **MODELS[model])


def recorded() -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return tokens
