"""The proof that llama.cpp survives a model: a child process loads it before this one does.

It has the memory and time that a header takes, reads no weights, allocates no KV cache and sees no GPU. It costs 0.27 s
of processor time for the demo model and 0.32 s for one with Phi-3's vocabulary (AMD EPYC, 2026-11-30), most of them for
Python to start.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edge_phi3.gguf_file import GgufFile
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.child_process import ChildProcess, WorkerDiedError, WorkerError
from edge_phi3.llama.options import ContextOptions


class Job(msgspec.Struct, frozen=True):
    """One model, as the parent is going to load it: `contexts` are the KV cells and sequences of each."""

    path: Path
    overrides: dict[str, int]
    adapters: list[Path]
    contexts: list[tuple[int, int]]
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
    job = Job(header.path, dict(overrides or {}), list(adapters), list(contexts), options)
    with ChildProcess("edge_phi3.llama.proof_worker", Survived, gpu="") as child:
        child.send(job)
        try:
            child.receive()
        except WorkerDiedError as error:
            what = f"{header.path} or an adapter" if adapters else str(header.path)
            raise ModelLoadError(f"llama.cpp dies of {what}, which is not loaded: {error}.") from error
        except WorkerError as error:
            raise ModelLoadError(str(error)) from error
