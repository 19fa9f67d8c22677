"""The checkpoints that the converter is compared on: every layout, dtype and spelling that it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.checkpoints import longrope, write_checkpoint

_LONG = longrope(16)
_LONG_CONTEXT: dict[str, Any] = {"max_position_embeddings": 131072, "sliding_window": 262144}
_NEW_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
    "short_factor": _LONG["short_factor"],
    "long_factor": _LONG["long_factor"],
}

CONVERTER_CASES: dict[str, dict[str, Any]] = {
    "4k": {"dtype": "bfloat16"},
    "4k-float16": {"dtype": "float16"},
    "4k-float32": {"dtype": "float32"},
    "128k": {"dtype": "bfloat16", "rope_scaling": _LONG, **_LONG_CONTEXT},
    "128k-su": {"dtype": "bfloat16", "rope_scaling": _LONG | {"type": "su"}, **_LONG_CONTEXT},
    "128k-yarn": {"dtype": "bfloat16", "rope_scaling": _LONG | {"type": "yarn"}, **_LONG_CONTEXT},
    "128k-rope_parameters": {"dtype": "bfloat16", **_LONG_CONTEXT, "config": {"rope_parameters": _NEW_ROPE}},
    "gqa": {"dtype": "bfloat16", "heads": 4, "kv_heads": 1, "sliding_window": 2047},
    "gqa-128k-sharded": {
        "dtype": "bfloat16", "kv_heads": 2, "shards": 3, "rope_scaling": _LONG, **_LONG_CONTEXT
    },
    "sharded": {"dtype": "bfloat16", "shards": 2, "layers": 3},
    "sharded-float32": {"dtype": "float32", "shards": 4},
    "rows-of-no-whole-blocks": {"dtype": "bfloat16", "intermediate_size": 72},
    "bos": {"dtype": "bfloat16", "add_bos": True, "sliding_window": None},
}  # fmt: skip
"""Arguments of `write_checkpoint` by name."""


def write_converter_case(folder: Path, name: str) -> Path:
    """Write the checkpoint of a case into a folder of its name in `folder`."""
    return write_checkpoint(folder / name, seed=3, **{"layers": 1, **CONVERTER_CASES[name]})


_SHORT_CONTEXT: dict[str, Any] = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}

LOGITS = Path(__file__).with_name("logits")

LOGITS_CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "4k": ({"layers": 2}, (17, 300, 2040)),
    "128k": ({"layers": 2, "rope_scaling": _LONG, "sliding_window": 262144, **_SHORT_CONTEXT}, (100, 256, 257, 900)),
    "gqa": ({"layers": 2, "heads": 4, "kv_heads": 2}, (17, 300)),
    "sharded": ({"layers": 3, "shards": 3}, (17, 300)),
    "tied": ({"layers": 2, "config": {"tie_word_embeddings": True}}, (17, 300)),
}
"""Arguments of `write_checkpoint`, and lengths of prompts, by name.

llama.cpp rounds a context up to 256 cells, so 256 is the smallest `original_max_position_embeddings` at which it can
still be made to use the short rope factors.
"""


def write_logits_case(folder: Path, name: str) -> Path:
    """Write the float32 checkpoint of a case into a folder of its name in `folder`."""
    return write_checkpoint(folder / name, seed=5, **LOGITS_CASES[name][0])


def prompt_of(length: int, vocab_size: int) -> list[int]:
    prompt: list[int] = (np.random.PCG64(length).random_raw(length) % np.uint64(vocab_size)).astype(int).tolist()
    return prompt
