"""The part "exactness": transformers' recorded answers with each kind of KV cache, in processes of their own."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.device import gpu
from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import Steps
from benchmarks.gpu.worker import run_module


def check_exactness(steps: Steps, options: Options) -> None:
    """Ask with an F32 and an F16 KV cache; on a GPU also with NVIDIA's switch against TF32.

    ggml's CUDA backend lets cuBLAS round F32 operands to TF32's 10 bits of mantissa, which the switch forbids.
    """
    more = ["--threads", str(options.threads)]
    more += ["--small"] if options.small else []
    more += ["--cpu"] if options.cpu else []
    for kv in ("f32", "f16"):
        steps.run(f"exactness.{kv}", lambda kv=kv: run_module("exactness_worker", ["--kv", kv, *more]))

    def without_tf32() -> Any:
        gpu()
        return run_module("exactness_worker", ["--kv", "f32", *more], environment={"NVIDIA_TF32_OVERRIDE": "0"})

    if not options.cpu:
        steps.run("exactness.f32-without-tf32", without_tf32)
