"""Questions to llama.cpp on memory, asked in a child process, and its log read for the answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_phi3.llama.options import FlashAttention, KVCacheType
from edge_phi3.planning.errors import PlanningError

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_MIB = 1 << 20


class AskedContext(msgspec.Struct, frozen=True):
    """What decides the contexts of a model: options of `EngineSettings`, and two of its hyper-parameters."""

    ctx_size: int
    parallel: int
    batch_size: int
    kv_cache_type: KVCacheType
    flash_attn: FlashAttention
    context_length: int
    original_context: int | None


class Job(msgspec.Struct, frozen=True):
    """One question.

    Attributes:
        model: a GGUF or a skeleton of one.
        n_gpu_layers: as in `EngineSettings`.
        host_tensors: a pattern of tensors that stay where the CPU computes, to learn the buffer of each; None not to.
        contexts: the contexts to plan; None for none.
    """

    model: str
    n_gpu_layers: int
    host_tensors: str | None
    contexts: AskedContext | None


class Question(msgspec.Struct, frozen=True):
    """All questions of a run of the child."""

    jobs: list[Job]


class Answer(msgspec.Struct, frozen=True):
    """llama.cpp's log: of placing the tensors, and of making each context."""

    placed: list[str]
    contexts: list[list[str]]


class Device(msgspec.Struct, frozen=True):
    """A GPU as llama.cpp sees it; `free` and `total` are bytes of its memory."""

    name: str
    free: int
    total: int
    shares_main_memory: bool


class Replies(msgspec.Struct, frozen=True):
    """What the child writes: whether its llama.cpp found a GPU, which it would use, and an answer for each job."""

    gpu_offload: bool
    devices: list[Device]
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class ContextMemory:
    """Bytes that one context takes.

    Attributes:
        cells: its KV cells, those of all its streams.
        kv: its KV cache, wherever its layers lie.
        compute: its compute buffers, by llama.cpp's name of the buffer: ``CPU``, ``CUDA0``, ``CUDA_Host``.
        output: its output buffer.
    """

    cells: int
    kv: int
    compute: dict[str, int]
    output: int


_KV = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells, +\d+ layers, +\d+/(\d+) seqs\)")
_COMPUTE = re.compile(r": +(\S+) compute buffer size = +([\d.]+) MiB")
_OUTPUT = re.compile(r": +\S+ +output buffer size = +([\d.]+) MiB")
_PLACED = re.compile(r"tensor (\S+) \(\d+ MiB \S+\) buffer type overridden to (\S+)")


def context_memory(log: Iterable[str]) -> ContextMemory:
    """Read what llama.cpp logs while it makes a context; made for batches of several sizes, the largest buffers count.

    Raises:
        PlanningError: it logs in a way not known here.
    """
    cells = kv = output = 0
    compute: dict[str, int] = {}
    for line in log:
        if match := _KV.search(line):
            kv, cells = _bytes(match[1]), int(match[2]) * int(match[3])
        elif match := _COMPUTE.search(line):
            compute[match[1]] = max(compute.get(match[1], 0), _bytes(match[2]))
        elif match := _OUTPUT.search(line):
            output = _bytes(match[1])
    if not (kv and compute and output):
        raise PlanningError(
            "llama.cpp's log does not tell what a context takes; install the version of llama-cpp-python that"
            " edge-phi3 asks for."
        )
    return ContextMemory(cells, kv, compute, output)


def placements(log: Iterable[str]) -> set[tuple[str, str]]:
    """Read which tensor goes into which buffer; a tensor with two uses (tied embeddings) may be in two."""
    return {(match[1], match[2]) for line in log if (match := _PLACED.search(line))}


def devices() -> list[Device]:
    """Give the GPUs that llama.cpp would lay layers on, of whatever kind its backends know.

    Raises:
        PlanningError: llama.cpp failed.
    """
    return ask([], gpu=None).devices


def ask(jobs: Sequence[Job], *, gpu: str | None) -> Replies:
    """Have a child process ask llama.cpp.

    Args:
        jobs: the questions.
        gpu: the one GPU that it may see, as CUDA_VISIBLE_DEVICES names it; empty for none, None for those it has.

    Raises:
        PlanningError: llama.cpp refused or failed.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH")])),
        "GGML_NO_BACKTRACE": "1",
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    finished = subprocess.run(
        [sys.executable, "-P", "-m", "edge_phi3.planning.worker"],
        input=msgspec.json.encode(Question(list(jobs))),
        capture_output=True,
        env=environment,
        check=False,
    )
    if finished.returncode != 0:
        lines = finished.stderr.decode("utf-8", "replace").strip().splitlines()
        words = next((line for line in lines if "GGML_ASSERT" in line or "fatal error" in line), "")
        words = words or (lines[-1].strip() if lines else f"exit code {finished.returncode}")
        what = f"what {Path(jobs[0].model).name} would take" if jobs else "which GPUs there are"
        raise PlanningError(f"llama.cpp cannot tell {what}: {words}.")
    return msgspec.json.decode(finished.stdout, type=Replies)


def _bytes(mebibytes: str) -> int:
    return round(float(mebibytes) * _MIB)
