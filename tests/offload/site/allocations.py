"""Plans and loads models on this process's device: cases come in on stdin, what was planned and allocated goes out.

A case is ``{"model": PATH, "types": [TYPE], "options": {...}, "free": BYTES, "prompt": BOOL}``, without types for a
quantised file. The answer to each has two parts, "planned" and "allocated", and in each the bytes by place ("device" or
"host") and kind of buffer, in llama.cpp's words. Allocated is what llama.cpp's log says while the engine loads the
model; with "prompt" each context is then given a prompt that fills a batch, which takes whatever is taken late.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edge_phi3.engine.loader import load
from edge_phi3.engine.settings import EngineSettings
from edge_phi3.llama.context import Context
from edge_phi3.planning.fit import Machine, Options, fit
from edge_phi3.planning.gguf_layout import read_layout

MIB = 1 << 20
LINE = re.compile(r": +(\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")


class Buffers(logging.Handler):
    """Adds up the buffers of llama.cpp's log, and keeps what the engine says of itself."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: dict[str, Counter[str]] = {"device": Counter(), "host": Counter()}
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        if match := LINE.search(record.getMessage()):
            place = "host" if match[1].startswith("CPU") or match[1].endswith("_Host") else "device"
            self.found[place][match[2]] += round(float(match[3]) * MIB)
        elif record.name == "edge_phi3.engine.loader":
            self.said = record.getMessage()


def planned(case: dict[str, Any]) -> dict[str, Any]:
    """Plan a file as it is."""
    machine = Machine(gpu=True, name="a device", free=case["free"], reserve=0)
    plan = fit(read_layout(Path(case["model"])), Options(**case["options"]), machine, case["types"])
    (row,) = plan.rows
    places = {"device": row.placement.device, "host": row.placement.host}
    return {"layers": row.placement.layers, "fits": row.fits, "asked": plan.gpu_asked} | {
        place: {"model": memory.weights, "KV": memory.kv_cache, "compute": memory.compute, "output": memory.output}
        for place, memory in places.items()
    }


def decode_prompt(context: Context) -> None:
    """Decode a prompt as long as a batch, or as a sequence may be, and want the logits of its end."""
    count = min(context.batch_size, context.cells)
    context.tokens[:count] = context.seq_ids[:count] = 0
    context.positions[:count] = np.arange(count)
    context.wants_logits[:count] = 0
    context.wants_logits[count - 1] = 1
    context.decode(count, 1)
    context.clear()


def allocated(case: dict[str, Any], layers: int) -> dict[str, Any]:
    """Load it with as many layers as planned."""
    logger, buffers = logging.getLogger("edge_phi3"), Buffers()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(buffers)
    loaded = load(EngineSettings(Path(case["model"]), **(case["options"] | {"n_gpu_layers": layers})))
    if case.get("prompt"):
        for runner in loaded.runners:
            decode_prompt(runner.context)
    loaded.close()
    logger.removeHandler(buffers)
    return {"said": buffers.said} | buffers.found


def main() -> None:
    """Answer all cases."""
    answers = []
    for case in json.load(sys.stdin):
        plan = planned(case)
        answers.append({"planned": plan, "allocated": allocated(case, plan["layers"])})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
