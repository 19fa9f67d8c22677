"""The part "exactness": transformers' recorded answers with each kind of KV cache, in processes of their own."""

import functools
import os
import subprocess
import sys
from typing import Any

import msgspec

from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import Steps


def check_exactness(steps: Steps, options: Options) -> None:
    """Ask with an F32 and, unless it is to be short, an F16 KV cache; on a GPU also with NVIDIA's switch against TF32.

    ggml's CUDA backend lets cuBLAS round F32 operands to TF32's 10 bits of mantissa, which the switch forbids.
    """
    more = ["--threads", str(options.threads)]
    more += ["--small"] if options.small else []
    more += ["--cpu"] if options.cpu else []
    for kv in ("f32",) if options.small else ("f32", "f16"):
        steps.run(f"exactness.{kv}", functools.partial(_ask, "--kv", kv, *more))
    if not options.cpu:
        steps.run("exactness.f32-without-tf32", lambda: _ask("--kv", "f32", *more, NVIDIA_TF32_OVERRIDE="0"))


def _ask(*arguments: str, **environment: str) -> Any:
    """Compare in a process of its own: a crash of llama.cpp is a failed step, and its memory is given back."""
    command = [sys.executable, "-m", "tests.support.exactness", *arguments]
    finished = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"it ended with status {finished.returncode}: {finished.stderr.strip()[-1500:]}")
    return msgspec.json.decode(finished.stdout.splitlines()[-1])
