"""The proof that llama.cpp survives a model: a child process loads it before this one does.

It has the memory and time that a header takes, reads no weights, allocates no KV cache and sees no GPU. It costs 0.27 s
of processor time for the demo model and 0.32 s for one with Phi-3's vocabulary (AMD EPYC, 2026-11-30), most of them for
Python to start. `prove` is the parent's side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edge_phi3.gguf_file import GgufFile
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.child_process import ChildProcess, Emit, WorkerDiedError, WorkerError, bound, serve_jobs
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model
from edge_phi3.llama.options import ContextOptions

_SECONDS = 60
"""Of processor time."""
_MEMORY = 3 << 30
"""Bytes beyond the file's own header, of which half a gigabyte is enough for every model of the family."""


class Job(msgspec.Struct, frozen=True):
    """One model, as the parent is going to load it: `contexts` are the KV cells and sequences of each."""

    path: Path
    overrides: Mapping[str, int]
    adapters: Sequence[Path]
    contexts: Sequence[tuple[int, int]]
    options: ContextOptions


class Survived(msgspec.Struct, tag=True, frozen=True):
    """The model loads."""


def prove(
    header: GgufFile,
    contexts: Sequence[tuple[int, int]],
    options: ContextOptions,
    *,
    overrides: Mapping[str, int] | None = None,
    adapters: Sequence[Path] = (),
) -> None:
    """Raise `ModelLoadError` if llama.cpp refuses a model, or dies of it, with these contexts and LoRA adapters."""
    with ChildProcess("edge_phi3.llama.proof", Survived, gpu="") as child:
        child.send(Job(header.path, overrides or {}, adapters, contexts, options))
        try:
            child.receive()
        except WorkerDiedError as error:
            what = f"{header.path} or an adapter" if adapters else str(header.path)
            raise ModelLoadError(f"llama.cpp dies of {what}, which is not loaded: {error}.") from error
        except WorkerError as error:
            raise ModelLoadError(str(error)) from error


def _prove(job: Job, emit: Emit) -> None:
    model = Model(job.path, n_gpu_layers=0, overrides=job.overrides, planned=True)
    for path in job.adapters:
        model.load_lora(path, 1.0)
    for cells, sequences in job.contexts:
        Context(model, cells=cells, sequences=sequences, settings=job.options).close()
    emit(Survived())


if __name__ == "__main__":
    bound(RLIMIT_CPU=_SECONDS, RLIMIT_DATA=_MEMORY, RLIMIT_CORE=0)
    serve_jobs(Job, _prove)
