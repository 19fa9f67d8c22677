"""llama.cpp allocates what `edge-phi3 fit` plans, for a model with Phi-3's real widths."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.conversion.phi3 import read_phi3
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.loader import load
from edge_phi3.planning.fit import Machine, Options, fit
from edge_phi3.planning.gguf_layout import write_base
from tests.support.models import PHI3_VOCABULARY_ROWS, SHAPES, model_path

pytestmark = pytest.mark.parity

MODEL = "0.65b"
TYPES = ("F16", "Q4_K_M")
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"ctx_size": 8192, "parallel": 4},
    {"ctx_size": 4096, "kv_cache_type": "f32"},
    {"ctx_size": 16384, "kv_cache_type": "q8_0", "batch_size": 256},
    {"ctx_size": 2048, "parallel": 1, "flash_attn": "off"},
)


def planned(case: dict[str, Any], folder: Path) -> dict[str, int]:
    """Plan both types from hyper-parameters alone; return bytes by type."""
    shape = SHAPES[MODEL]
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_attention_heads": shape["heads"],
        "num_hidden_layers": shape["layers"],
        "vocab_size": PHI3_VOCABULARY_ROWS,
    }
    base = write_base(folder / "base.gguf", read_phi3(config))
    found = fit(base, Options(**case), Machine(gpu=False, name="", free=1 << 50, reserve=0), TYPES)
    return {row.type: row.placement.host.total for row in found.rows}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_planned_is_allocated(case: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plans = planned(case, tmp_path)
    for kind in TYPES:
        path = model_path(MODEL, kind=kind)
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "edge_phi3.llama"):
            load(EngineSettings(path, **case)).close()
        lines = [re.search(r"\w+ buffer size = +([\d.]+) MiB", line) for line in caplog.messages]
        allocated = sum(float(line[1]) * 2**20 for line in lines if line)
        # In all ten cases the plan was off by less than 0.001 %, the rounding of the log.
        assert plans[kind] == pytest.approx(allocated, rel=0.01), kind
