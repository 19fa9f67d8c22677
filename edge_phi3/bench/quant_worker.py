"""Measures one GGUF in a process of its own, so that load time and peak memory are that file's alone."""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import psutil
import rich_click as click
from numpy.typing import NDArray

from edge_phi3.bench import BenchError
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.options import ONE_OR_MORE, Option
from edge_phi3.bench.quality import Quality, cut_chunks, evaluate, feed, writing
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.backend import supports_gpu_offload
from edge_phi3.llama.child_process import ChildProcess, WorkerDiedError, WorkerError, serve_jobs
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model
from edge_phi3.system_resources import gpus

_BATCH = 512


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """How a file is measured: options of `edge-phi3 bench quants`."""

    parse_special: Annotated[
        bool,
        Option(
            "Read special tokens such as <|user|> in the text as tokens; llama-perplexity reads them as characters."
        ),
    ] = True
    ctx_size: Annotated[int, Option("Number of tokens in a chunk of the text.", click.IntRange(min=4))] = 512
    chunks: Annotated[int | None, Option("Maximum number of chunks to evaluate.", ONE_OR_MORE)] = None
    threads: Annotated[int | None, Option("Number of CPU threads. [default: physical cores]", ONE_OR_MORE)] = None
    n_gpu_layers: Annotated[int, Option("Number of layers on the GPU; -1 is all.")] = -1
    prompt_tokens: Annotated[int, Option("Length of the prompt that is timed, in tokens.", ONE_OR_MORE)] = 512
    generated_tokens: Annotated[
        int,
        Option(
            "Number of tokens that are generated and timed after the prompt.", ONE_OR_MORE, flag="--generate-tokens"
        ),
    ] = 64
    repetitions: Annotated[
        int, Option("Number of times that speed is measured; medians are reported.", ONE_OR_MORE)
    ] = 3


class Job(Conditions, frozen=True, kw_only=True):
    """What to measure, and how: the `reference`, whose log-probabilities are written to `logits`, or another file."""

    model: Path
    text: str
    logits: Path
    reference: bool


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one sequence runs, without HTTP: medians over the `turns`.

    The prompt is of random tokens, those after it are generated greedily. A turn is `first_token`, in seconds, and
    `generated_per_second`, the tokens a second after the first.
    """

    prompt_tokens: int
    generated_tokens: int
    prompt_per_second: float
    generated_per_second: float
    first_token: float
    turns: list[tuple[float, float]]


class Figures(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a process of its own measures of a file; memory is in bytes.

    `bits_per_weight` are those of all tensors, metadata not counted. `load_seconds` go from opening the file, which
    comes from the system's cache, to the first decoded token. `memory_before` is resident before the process loads the
    model, `memory_peak` at most until it has generated, mapped pages of the file and the KV cache included.
    `gpu_memory` is taken on the GPUs meanwhile; None without one.
    """

    bits_per_weight: float
    load_seconds: float
    memory_before: int
    memory_peak: int
    gpu_memory: int | None
    speed: Speed
    quality: Quality
    machine: Machine


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So many of so many chunks are evaluated."""

    done: int
    total: int


def measure(job: Job, progress: Callable[[Progress], None] | None = None) -> Figures:
    """Measure a file in a fresh process, which ends with this call whatever happens.

    `BenchError` says that it cannot be loaded or evaluated, or that the process died, for want of memory most often.
    """
    with ChildProcess("edge_phi3.bench.quant_worker", Progress | Figures) as child:
        child.send(job)
        try:
            while isinstance(event := child.receive(), Progress):
                if progress is not None:
                    progress(event)
        except WorkerDiedError as error:
            raise BenchError(f"The process that measured {job.model.name} died: {error}.") from error
        except WorkerError as error:
            raise BenchError(str(error)) from error
    figures: Figures = event
    return figures


def work(job: Job, tell: Callable[[Progress], None]) -> Figures:
    """Measure a file in this process, and tell of each evaluated chunk; errors reach `measure` as `BenchError`."""
    machine = Machine.here()
    before, gpu_before = psutil.Process().memory_info().rss, _gpu_bytes_in_use()
    layers = job.n_gpu_layers if supports_gpu_offload() else 0
    settings = EngineSettings(job.model, threads=job.threads or 0, batch_size=_BATCH)
    cells = job.prompt_tokens + job.generated_tokens
    started = time.perf_counter()
    model = Model(settings.model_path, n_gpu_layers=layers)
    context = Context(model, cells=cells, sequences=1, settings=settings)
    context.warm_up()
    load_seconds = time.perf_counter() - started
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, job.prompt_tokens, np.int32)
    turns = [_turn(context, prompt, job.generated_tokens) for _ in range(job.repetitions)]
    first = statistics.median(seconds for seconds, _ in turns)
    peak, gpu_after = _peak_resident_bytes(), _gpu_bytes_in_use()
    context.close()
    tokens = Tokenizer(model).encode(job.text, parse_special=job.parse_special)
    chunks = cut_chunks(tokens, job.ctx_size, job.chunks)
    evaluated = functools.partial(
        evaluate,
        Context(model, cells=job.ctx_size, sequences=1, settings=settings, scored=_BATCH),
        chunks,
        bos=model.bos_token_id if model.adds_bos else None,
        done=lambda number: tell(Progress(number, len(chunks))),
    )
    if job.reference:
        with writing(job.logits, chunks, model.vocab_size) as keep:
            quality = evaluated(keep=keep)
    else:
        quality = evaluated(reference=np.load(job.logits, mmap_mode="r"))
    return Figures(
        bits_per_weight=8 * model.size / model.parameters,
        load_seconds=load_seconds,
        memory_before=before,
        memory_peak=peak,
        gpu_memory=None if gpu_before is None or gpu_after is None else max(0, gpu_after - gpu_before),
        speed=Speed(
            prompt_tokens=job.prompt_tokens,
            generated_tokens=job.generated_tokens,
            prompt_per_second=job.prompt_tokens / first,
            generated_per_second=statistics.median(rate for _, rate in turns),
            first_token=first,
            turns=turns,
        ),
        quality=quality,
        machine=machine,
    )


def _turn(context: Context, prompt: NDArray[np.int32], count: int) -> tuple[float, float]:
    """Feed a prompt and generate; return the seconds to the first token, and the tokens a second after it."""
    wanted = np.zeros(len(prompt), np.bool_)
    wanted[-1] = True
    started = time.perf_counter()
    *_, (_, logits) = feed(context, prompt, wanted)
    token = int(logits[-1].argmax())
    first = time.perf_counter()
    for position in range(len(prompt), len(prompt) + count):
        context.tokens[0], context.positions[0], context.wants_logits[0] = token, position, 1
        token = int(context.decode(1, 1)[0].argmax())
    return first - started, count / (time.perf_counter() - first)


def _peak_resident_bytes() -> int:
    # getrusage's ru_maxrss begins with what the parent had when it forked; VmHWM begins anew with the program.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _gpu_bytes_in_use() -> int | None:
    # By any process: inside a container it cannot be told from others, and so two calls make a difference.
    found = gpus()
    return sum(gpu.used for gpu in found) if found else None


if __name__ == "__main__":
    serve_jobs(Job, lambda job, emit: emit(work(job, emit)))
