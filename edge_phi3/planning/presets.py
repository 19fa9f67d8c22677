"""What the ``config.json`` of the presets says, as far as it decides on memory."""

import json
from pathlib import Path
from typing import Any

from edge_phi3.catalog import PRESETS


def _config(rope_factors: int = 0, **stated: Any) -> dict[str, Any]:
    """Return a configuration with so many rotary factors, one for each pair of a head's rotated elements.

    The number of factors takes memory; their values do not matter here.
    """
    factors = dict.fromkeys(("short_factor", "long_factor"), [1.0] * rope_factors)
    return stated | ({"rope_scaling": {"type": "longrope", **factors}} if rope_factors else {})


_STATED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PRESET_CONFIGS = {PRESETS[name]: _config(**_STATED["all"] | stated) for name, stated in _STATED["each"].items()}
"""By repository."""
