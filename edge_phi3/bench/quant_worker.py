"""Measures one GGUF in a process of its own, so that load time and peak memory are that file's alone.

`measure` is the parent's side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.logits_file import LogitsFile, writing
from edge_phi3.bench.machine import Machine, gpu_bytes_in_use, peak_resident_bytes, resident_bytes
from edge_phi3.bench.quality import Quality, compare, cut_chunks, record
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.backend import supports_gpu_offload
from edge_phi3.llama.child_process import ChildProcess, WorkerDiedError, WorkerError, serve_jobs
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model

_BATCH = 512


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """How a file is measured.

    Attributes:
        parse_special: whether ``<|user|>`` in the text is the token, or the characters as in llama-perplexity.
        ctx_size: tokens of an evaluated chunk.
        chunks: how many to evaluate at most.
        threads: CPU threads; None takes the physical cores that the process may use.
        n_gpu_layers: layers on the GPU where there is one; negative for all.
        prompt_tokens: length of the prompt that speed is measured with.
        generated_tokens: tokens generated after it.
        repetitions: how often.
    """

    parse_special: bool = True
    ctx_size: int = 512
    chunks: int | None = None
    threads: int | None = None
    n_gpu_layers: int = -1
    prompt_tokens: int = 512
    generated_tokens: int = 64
    repetitions: int = 3


class Job(Conditions, frozen=True, kw_only=True):
    """What to measure, and how.

    Attributes:
        model: the GGUF file.
        logits: the reference's log-probabilities: written when `text` is given, and compared with otherwise.
        text: what the reference is evaluated on; None for every other model.
    """

    model: str
    logits: str
    text: str | None


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one sequence runs, without HTTP: medians over the repetitions.

    Attributes:
        prompt_tokens: length of the prompt.
        generated_tokens: tokens generated after it, greedily.
        prompt_per_second: prompt tokens a second.
        generated_per_second: generated tokens a second, after the first.
        first_token: seconds from the prompt's tokens to the first token of the answer.
        turns: of each repetition, seconds to the first token and generated tokens a second.
    """

    prompt_tokens: int
    generated_tokens: int
    prompt_per_second: float
    generated_per_second: float
    first_token: float
    turns: list[tuple[float, float]]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of its own measures of a file.

    Attributes:
        load_seconds: from opening the file to the first decoded token; the file had just been written or read, so that
            it comes from the system's cache rather than from the disk.
        memory_before: resident bytes of the process before it loads the model.
        memory_peak: the most resident bytes while it loads and generates, with a KV cache for prompt and answer; mapped
            pages of the file included.
        gpu_memory: bytes taken on the GPUs meanwhile; None without one.
        speed: of one sequence.
        quality: of its predictions.
        machine: where it was measured, and when.
    """

    load_seconds: float
    memory_before: int
    memory_peak: int
    gpu_memory: int | None
    speed: Speed
    quality: Quality
    machine: Machine


class Measured(Figures, frozen=True, kw_only=True, tag=True):
    """The figures of a file.

    Attributes:
        bits_per_weight: of all tensors together, metadata not counted.
    """

    bits_per_weight: float


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So many of so many chunks are evaluated."""

    done: int
    total: int


def measure(job: Job, progress: Callable[[Progress], None] | None = None) -> Measured:
    """Measure a file in a fresh process, which ends with this call whatever happens.

    Raises:
        BenchError: it cannot be loaded or evaluated, or the process died, for want of memory most often.
    """
    with ChildProcess("edge_phi3.bench.quant_worker", Progress | Measured) as child:
        child.send(job)
        try:
            while isinstance(event := child.receive(), Progress):
                if progress is not None:
                    progress(event)
        except WorkerDiedError as error:
            raise BenchError(f"The process that measured {Path(job.model).name} died: {error}.") from error
        except WorkerError as error:
            raise BenchError(str(error)) from error
    measured: Measured = event
    return measured


def work(job: Job, tell: Callable[[Progress], None]) -> Measured:
    """Measure a file in this process.

    Args:
        job: what to measure.
        tell: called with each evaluated chunk.

    Raises:
        BenchError: the text is too short, or the model's vocabulary is not the reference's.
        ModelLoadError, DecodeFailedError: llama.cpp cannot load or evaluate it.
    """
    machine = Machine.here()
    before, gpu_before = resident_bytes(), gpu_bytes_in_use()
    layers = job.n_gpu_layers if supports_gpu_offload() else 0
    settings = EngineSettings(Path(job.model), threads=job.threads or 0, batch_size=_BATCH)
    cells = job.prompt_tokens + job.generated_tokens
    started = time.perf_counter()
    model = Model(settings.model_path, n_gpu_layers=layers)
    context = Context(model, cells=cells, sequences=1, settings=settings)
    context.warm_up()
    load_seconds = time.perf_counter() - started
    reference = None if job.text is not None else LogitsFile.open(Path(job.logits))
    chunks = _chunks(model, job) if reference is None else reference.tokens
    speed = _speed(context, chunks.ravel(), job)
    peak, gpu_after = peak_resident_bytes(), gpu_bytes_in_use()
    context.close()
    bos = model.bos_token_id if model.adds_bos else None
    context = Context(model, cells=job.ctx_size, sequences=1, settings=settings)

    def done(number: int) -> None:
        tell(Progress(number, len(chunks)))

    if reference is None:
        with writing(Path(job.logits), chunks, model.vocab_size) as writer:
            quality = record(context, chunks, writer, bos=bos, done=done)
    elif reference.vocab_size != model.vocab_size:
        raise BenchError(
            f"{job.model} has a vocabulary of {model.vocab_size} words and the reference one of {reference.vocab_size};"
            " only types of one model can be compared."
        )
    else:
        quality = compare(context, reference, bos=bos, done=done)
    return Measured(
        bits_per_weight=8 * model.size / model.parameters,
        load_seconds=load_seconds,
        memory_before=before,
        memory_peak=peak,
        gpu_memory=None if gpu_before is None or gpu_after is None else max(0, gpu_after - gpu_before),
        speed=speed,
        quality=quality,
        machine=machine,
    )


def _chunks(model: Model, job: Job) -> NDArray[np.int32]:
    assert job.text is not None
    tokens = Tokenizer(model).encode(job.text, parse_special=job.parse_special)
    return cut_chunks(tokens, job.ctx_size, job.chunks)


def _speed(context: Context, tokens: NDArray[np.int32], job: Job) -> Speed:
    prompt = np.resize(tokens, job.prompt_tokens)
    turns = [_turn(context, prompt, job.generated_tokens) for _ in range(job.repetitions)]
    first = statistics.median(seconds for seconds, _ in turns)
    return Speed(
        prompt_tokens=job.prompt_tokens,
        generated_tokens=job.generated_tokens,
        prompt_per_second=job.prompt_tokens / first,
        generated_per_second=statistics.median(rate for _, rate in turns),
        first_token=first,
        turns=turns,
    )


def _turn(context: Context, prompt: NDArray[np.int32], count: int) -> tuple[float, float]:
    """Feed a prompt and generate; return the seconds to the first token, and the tokens a second after it."""
    context.clear()
    context.seq_ids[:] = 0
    started = time.perf_counter()
    logits = np.empty((0, 0), np.float32)
    for start in range(0, len(prompt), context.batch_size):
        part = prompt[start : start + context.batch_size]
        context.tokens[: len(part)] = part
        context.positions[: len(part)] = np.arange(start, start + len(part))
        last = start + len(part) == len(prompt)
        context.wants_logits[: len(part)] = 0
        context.wants_logits[len(part) - 1] = last
        logits = context.decode(len(part), int(last))
    token = int(logits[-1].argmax())
    first = time.perf_counter()
    for position in range(len(prompt), len(prompt) + count):
        context.tokens[0], context.positions[0], context.wants_logits[0] = token, position, 1
        token = int(context.decode(1, 1)[0].argmax())
    return first - started, count / (time.perf_counter() - first)


if __name__ == "__main__":
    serve_jobs(Job, lambda job, emit: emit(work(job, emit)))
