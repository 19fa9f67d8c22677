"""The text side: what went into transformers' text-generation pipeline, and what came out.

``pipeline.json`` holds pairs: the arguments of a call, ``kwargs`` being the generation parameters, always greedy or
beam search, and its texts. The random model speaks gibberish full of byte tokens, special tokens and odd spaces, which
is what the text side must get right.
"""

import json
from pathlib import Path
from typing import Any

from tests.golden.checkpoints import write_checkpoint

GOLDEN = Path(__file__).with_name("pipeline.json")


def write_model(folder: Path) -> Path:
    """Write the random checkpoint that the cases run on; it generates up to 192 tokens in all."""
    return write_checkpoint(folder, seed=11, hidden_size=64, heads=4, layers=2, max_position_embeddings=192)


def cases() -> list[dict[str, Any]]:
    return [case for case, _ in json.loads(GOLDEN.read_text(encoding="utf-8"))]


def recorded() -> list[list[str]]:
    return [texts for _, texts in json.loads(GOLDEN.read_text(encoding="utf-8"))]
