"""Small random checkpoints of each member of the family: its ratios of sizes, attention, positions and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.golden.byte_level import small_vocabulary
from tests.golden.checkpoints import long_context, longrope, write_checkpoint

_WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "heads": 4, "layers": 2}
"""Rows that fill blocks of k-quants, and heads of 64 elements."""


def _phi_4_mini(style: str) -> dict[str, Any]:
    vocabulary = small_vocabulary(style)
    return {
        **_WIDE,
        **long_context(),
        **vocabulary.config(),
        "rope_scaling": longrope(48),  # of the 64 elements of a head, 48 are rotated: 24 factors
        "kv_heads": 2,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "vocabulary": vocabulary,
        "gain": 3.0,
    }


FAMILY: dict[str, dict[str, Any]] = {
    "phi-3-mini-4k-instruct": {**_WIDE, "sliding_window": 2047},
    "phi-3-mini-128k-instruct": {**_WIDE, **long_context(64)},
    "phi-3-medium-4k-instruct": {**_WIDE, "kv_heads": 1, "sliding_window": 2047},
    "phi-3-medium-128k-instruct": {**_WIDE, **long_context(64), "kv_heads": 1, "sliding_window": 131072},
    "phi-3.5-mini-instruct": {**_WIDE, **long_context(64)},
    "phi-4-mini-instruct": _phi_4_mini("PHI_4_MINI"),
    "phi-4-mini-reasoning": _phi_4_mini("PHI_4_MINI_REASONING"),
    "phi-4": {
        **_WIDE,
        **small_vocabulary("PHI_4").config(),
        "kv_heads": 1,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rope_theta": 250000,
        "sliding_window": None,
        "vocabulary": small_vocabulary("PHI_4"),
    },
}
"""What `write_checkpoint` makes each member with, by its preset's name."""


def write_member(folder: Path, name: str, **options: Any) -> Path:
    """Write a member's checkpoint into a folder of its name in `folder`, and return it."""
    return write_checkpoint(folder / name, **{"seed": 11, **FAMILY[name], **options})
