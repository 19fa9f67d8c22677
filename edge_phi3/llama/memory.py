"""What a model takes of the memory: planned by llama.cpp in a child process, and read from its log."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from edge_phi3.llama import PlanningError
from edge_phi3.llama.child_process import ChildProcess, WorkerError
from edge_phi3.llama.options import ContextOptions


class Job(msgspec.Struct, frozen=True):
    """One question on a GGUF or a skeleton of one: the KV cells and sequences of each context to plan, and more.

    `host_tensors` is a pattern of tensors that stay where the CPU computes.
    """

    model: Path
    n_gpu_layers: int
    host_tensors: str
    contexts: list[tuple[int, int]]
    options: ContextOptions


class ContextMemory(msgspec.Struct, frozen=True):
    """Bytes that one context of so many KV cells takes: KV cache, compute buffers, output buffer.

    Compute buffers go by llama.cpp's names of them: ``CPU``, ``CUDA0``, ``CUDA_Host``.
    """

    cells: int
    kv: int
    compute: dict[str, int]
    output: int


class Answer(msgspec.Struct, tag=True, frozen=True):
    """What each context takes, and pairs of a tensor where the CPU computes and llama.cpp's buffer for it, or two."""

    buffers: set[tuple[str, str]]
    contexts: list[ContextMemory]


class Device(msgspec.Struct, frozen=True):
    """A GPU as llama.cpp sees it; `free` and `total` are bytes of its memory."""

    name: str
    free: int
    total: int
    shares_main_memory: bool


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The child's first event: whether its llama.cpp found a GPU, which it would use."""

    gpu_offload: bool
    devices: list[Device]


_KV = re.compile(r"llama_kv_cache: size = +([\d.]+) MiB \( *(\d+) cells, +\d+ layers, +\d+/(\d+) seqs\)")
_COMPUTE = re.compile(r": +(\S+) compute buffer size = +([\d.]+) MiB")
_OUTPUT = re.compile(r": +\S+ +output buffer size = +([\d.]+) MiB")


def context_memory(log: Iterable[str]) -> ContextMemory:
    """Read what llama.cpp logs while it makes a context; for batches of several sizes, the largest buffers count."""
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
            "its log does not say what a context takes; install the version of llama-cpp-python that edge-phi3 asks for"
        )
    return ContextMemory(cells, kv, compute, output)


def devices() -> list[Device]:
    """Return the GPUs that llama.cpp would lay layers on, of whatever kind its backends know."""
    return plan_memory([], gpu=None)[0].devices


def plan_memory(jobs: Sequence[Job], *, gpu: str | None) -> tuple[Ready, list[Answer]]:
    """Ask llama.cpp what it would allocate; return what it knows of GPUs, and an answer for each job.

    The contexts of the first job are those of all where llama.cpp has no GPU, and planned once.
    """
    answers: list[Answer] = []
    with ChildProcess("edge_phi3.llama.memory_worker", Ready | Answer, gpu=gpu) as child:
        try:
            ready: Ready = child.receive()
            for number, job in enumerate(jobs):
                once = number > 0 and not ready.gpu_offload
                child.send(msgspec.structs.replace(job, contexts=[]) if once else job)
            while len(answers) < len(jobs):
                answers.append(child.receive())
        except WorkerError as error:
            what = f"what {jobs[len(answers)].model.name} would take" if jobs else "which GPUs there are"
            raise PlanningError(f"llama.cpp cannot tell {what}: {error}.") from error
    return ready, answers


def _bytes(mebibytes: str) -> int:
    return round(float(mebibytes) * (1 << 20))
