"""Small random checkpoints of each member of the family: its ratios of sizes, attention, positions and tokenizer."""

from pathlib import Path
from typing import Any

from tests.golden.byte_level import small_vocabulary
from tests.golden.checkpoints import long_context, write_checkpoint
from tests.support.cases import tables

_WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "heads": 4, "layers": 2}
"""Rows that fill blocks of k-quants, and heads of 64 elements."""


def _shape(long: int = 0, vocabulary: str = "", **given: Any) -> dict[str, Any]:
    made = _WIDE | (long_context(long) if long else {})
    if vocabulary:
        made |= small_vocabulary(vocabulary).config() | {"vocabulary": small_vocabulary(vocabulary)}
    return made | given


FAMILY = {name: _shape(**given) for name, given in tables(__file__)["FAMILY"].items()}
"""What `write_checkpoint` makes each member with, by its preset's name."""


def write_member(folder: Path, name: str, **options: Any) -> Path:
    """Write a member's checkpoint into a folder of its name in `folder`, and return it."""
    return write_checkpoint(folder / name, **{"seed": 11, **FAMILY[name], **options})
