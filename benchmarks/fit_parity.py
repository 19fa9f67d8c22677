"""Compare what `edge-phi3 fit` plans with what llama.cpp allocates, for a model with Phi-3's real widths.

    python -m benchmarks.fit_parity                       # 0.65b in F16 and Q4_K_M, planned and loaded
    python -m benchmarks.fit_parity --record              # and writes results/fit_parity.json

Planned is from the numbers of the model alone; allocated is the sum of the buffers in llama.cpp's log while the engine
loads it. Exit code 1 when a sum is more than 5 % off.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.models import CACHE, PHI3_VOCABULARY_ROWS, RANDOM_MODELS, model_path
from edge_phi3.bench.machine import Machine as Here
from edge_phi3.conversion.phi3 import read_phi3
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.loader import load
from edge_phi3.planning.fit import Machine, Options, fit
from edge_phi3.planning.gguf_layout import write_base

RESULTS = Path(__file__).parent / "results" / "fit_parity.json"
MODEL = "0.65b"
TYPES = ("F16", "Q4_K_M")
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"ctx_size": 8192, "parallel": 4},
    {"ctx_size": 4096, "kv_cache_type": "f32"},
    {"ctx_size": 16384, "kv_cache_type": "q8_0", "batch_size": 256},
    {"ctx_size": 2048, "parallel": 1, "flash_attn": "off"},
)
_MIB = 1 << 20


class Buffers(logging.Handler):
    """Adds up the buffers of llama.cpp's log, by kind."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        if match := re.search(r"(\w+) buffer size = +([\d.]+) MiB", record.getMessage()):
            self.found[{"KV": "kv_cache", "model": "weights"}.get(match[1], match[1])] += round(float(match[2]) * _MIB)


def allocated(path: Path, case: dict[str, Any]) -> dict[str, int]:
    """Load a model and give the bytes that llama.cpp says it took."""
    logger, buffers = logging.getLogger("edge_phi3.llama"), Buffers()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(buffers)
    try:
        load(EngineSettings(path, **case)).close()
    finally:
        logger.removeHandler(buffers)
    return dict(buffers.found)


def planned(case: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Plan all types from hyper-parameters alone."""
    shape, _ = RANDOM_MODELS[MODEL]
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_attention_heads": shape["heads"],
        "num_hidden_layers": shape["layers"],
        "vocab_size": PHI3_VOCABULARY_ROWS,
    }
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base.gguf", read_phi3(config))
        found = fit(base, Options(**case), Machine(gpu=False, name="", free=1 << 50, reserve=0), TYPES)
    return {
        row.type: {part: getattr(row.placement.host, part) for part in ("weights", "kv_cache", "compute", "output")}
        for row in found.rows
    }


def main() -> int:
    """Plan, load, compare; one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument(
        "--record", type=Path, nargs="?", const=RESULTS, help=f"write results/{RESULTS.name}, or the file named"
    )
    arguments = parser.parse_args()
    rows, worst = [], 0.0
    for case in CASES:
        plans = planned(case)
        for kind in TYPES:
            truth = allocated(model_path(MODEL, arguments.cache, kind), case)
            plan = plans[kind]
            difference = sum(plan.values()) / sum(truth.values()) - 1
            worst = max(worst, abs(difference))
            rows.append({"type": kind, "options": case, "planned": plan, "allocated": truth, "difference": difference})
            both = ", ".join(f"{part} {plan[part] / _MIB:.1f}/{truth[part] / _MIB:.1f}" for part in plan)
            print(f"{kind:7} {case}: planned/allocated MiB: {both}; {difference:+.2%}", flush=True)
    if arguments.record:
        report = {
            "command": "python -m benchmarks.fit_parity --record",
            "machine": msgspec.to_builtins(Here.here()),
            "model": MODEL,
            "worst_difference": worst,
            "rows": rows,
        }
        arguments.record.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(worst > 0.05)


if __name__ == "__main__":
    sys.exit(main())
