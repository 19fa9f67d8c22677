"""What the ``config.json`` of the presets says, as far as it decides on memory."""

from __future__ import annotations

from typing import Any

from edge_phi3.catalog import PRESETS

_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
}
_MEDIUM = _MINI | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}


def _long(pairs: int, window: int = 262144) -> dict[str, Any]:
    """Return what models of 131,072 tokens have, with a factor for each pair of a head's rotated elements.

    The number of factors takes memory; their values do not matter here.
    """
    factors = dict.fromkeys(("short_factor", "long_factor"), [1.0] * pairs)
    scaling = {"type": "longrope", **factors}
    return {"max_position_embeddings": 131072, "sliding_window": window, "rope_scaling": scaling}


_PHI_4_MINI = {
    **_MINI,
    **_long(48),
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}

PRESET_CONFIGS: dict[str, dict[str, Any]] = {
    PRESETS[name]: config
    for name, config in {
        "phi-3-mini-4k-instruct": _MINI,
        "phi-3-mini-128k-instruct": _MINI | _long(48),
        "phi-3.5-mini-instruct": _MINI | _long(48),
        "phi-3-medium-4k-instruct": _MEDIUM,
        "phi-3-medium-128k-instruct": _MEDIUM | _long(64, window=131072),
        "phi-4-mini-instruct": _PHI_4_MINI,
        "phi-4-mini-reasoning": _PHI_4_MINI,
        "phi-4": {
            **_MEDIUM,
            "max_position_embeddings": 16384,
            "original_max_position_embeddings": 16384,
            "sliding_window": None,
            "vocab_size": 100352,
        },
    }.items()
}
"""By repository."""
