"""The child process that loads a model first: ``python -m edge_phi3.llama.proof_worker``."""

from edge_phi3.llama.child_process import Emit, bound, serve_jobs
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model
from edge_phi3.llama.model_file import read_model_file
from edge_phi3.llama.proof import Job, Survived

_SECONDS = 60
"""Of processor time."""
_MEMORY = 3 << 30
"""Bytes beyond the file's own header, of which half a gigabyte is enough for every model of the family."""


def _start(_emit: Emit) -> None:
    bound(RLIMIT_CPU=_SECONDS, RLIMIT_DATA=_MEMORY, RLIMIT_CORE=0)


def _prove(job: Job, emit: Emit) -> None:
    model = Model(read_model_file(job.path), n_gpu_layers=0, overrides=job.overrides, planned=True)
    for path in job.adapters:
        model.load_lora(path, 1.0)
    for cells, sequences in job.contexts:
        Context(model, cells=cells, sequences=sequences, settings=job.options).close()
    emit(Survived())


if __name__ == "__main__":
    serve_jobs(Job, _prove, ready=_start)
