"""From a GGUF file to a model that is ready to decode: contexts, the family's attention rules, end tokens, warm-up."""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_phi3.engine.batch_sizes import measure
from edge_phi3.engine.engine_settings import ContextShape, EngineSettings, context_shapes
from edge_phi3.engine.host_cache import BLOCK_SIZE, PER_STEP, HostCache
from edge_phi3.engine.model_runner import ModelRunner
from edge_phi3.engine.speculation import Speculation
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.generation.config import ModelDefaults
from edge_phi3.gguf_file import split_files
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.backend import supports_gpu_offload
from edge_phi3.llama.context import Context
from edge_phi3.llama.huge_pages import use_huge_pages
from edge_phi3.llama.model import Model
from edge_phi3.llama.model_file import read_model_file
from edge_phi3.llama.proof import prove
from edge_phi3.system_resources import available_memory, usable_cores

logger = logging.getLogger(__name__)

_CONTEXT = "phi3.context_length"
_ORIGINAL_CONTEXT = "phi3.rope.scaling.original_context_length"
_PERIOD = 0.5
"""Seconds from one look at the files that are served to the next."""


class ServedFiles:
    """Files that must stay as they are. One that another file takes the place of, as by a rename, stays the old one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._stop = threading.Event()
        self._files: list[tuple[Path, int, tuple[int, int]]] = []
        try:
            for path in paths:
                descriptor = os.open(path, os.O_RDONLY)
                self._files.append((path, descriptor, _look(descriptor)))
        except OSError as error:
            self.close()
            raise ModelLoadError(f"The model {error.filename} cannot be read: {error.strerror}.") from error

    def watch(self, changed: Callable[[str], None]) -> None:
        """Look at the files until `close`, in a thread, which calls `changed` once with a sentence on what has."""
        threading.Thread(target=self._run, args=(changed,), name="served-files", daemon=True).start()

    def _run(self, changed: Callable[[str], None]) -> None:
        while not self._stop.wait(_PERIOD):
            for path, descriptor, before in self._files:
                if (now := _look(descriptor)) != before:
                    what = f"cut short to {now[0]} bytes" if now[0] < before[0] else "overwritten"
                    changed(
                        f"The model {path} was {what} while it was served, and what was loaded of it is lost."
                        " Replace models by renaming new files over them, or serve with --no-mmap."
                    )
                    return

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        while self._files:
            os.close(self._files.pop()[1])


def _look(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, with a runner for each of its contexts.

    A model with two sets of rotary factors may have two, the first for sequences up to the original context. `defaults`
    is what the model's ``generation_config.json`` says. `gpu_layers` counts the layers on a GPU, the output as one of
    them. `files` are those that are mapped. `close` frees the contexts, and then the model.
    """

    model: Model
    tokenizer: Tokenizer
    runners: list[ModelRunner]
    defaults: ModelDefaults
    gpu_layers: int
    files: ServedFiles
    close: Callable[[], None]


def load(settings: EngineSettings) -> LoadedModel:
    """Load and warm up a model."""
    gpu = supports_gpu_offload()
    if settings.require_gpu and not (gpu and settings.n_gpu_layers):
        raise ModelLoadError(_why_no_gpu(settings))
    header = read_model_file(settings.model_path)
    context_length, original = int(header.values.get(_CONTEXT, 0)), int(header.values.get(_ORIGINAL_CONTEXT, 0))
    original = original if 0 < original < context_length else 0
    shapes = context_shapes(settings, context_length, original or None, gpu=gpu)
    with contextlib.ExitStack() as stack:
        files = ServedFiles(split_files(settings.model_path) if settings.mmap else [])
        stack.callback(files.close)
        # Where short and long rotary factors part: the first context is no larger, and so takes the short ones.
        overrides = {_ORIGINAL_CONTEXT: shapes[0].cells} if original else {}
        sizes = [(shape.cells, shape.sequences) for shape in shapes]
        prove(header, sizes, settings, overrides=overrides, adapters=[lora.path for lora in settings.lora])
        layers = settings.n_gpu_layers if gpu else 0
        model = Model(header, n_gpu_layers=layers, overrides=overrides, mapped=settings.mmap)
        stack.callback(model.close)
        for path, scale, name in settings.lora:
            model.load_lora(path, scale, settings.adapters.index(name) + 1 if name else 0)
        try:
            tokenizer = Tokenizer(model)
            defaults = _defaults(model, tokenizer)
        except (ValueError, TypeError, LookupError, RecursionError, msgspec.MsgspecError) as error:
            raise ModelLoadError(
                f"What {model.path} says of its tokens or of generation is nonsense: {error}."
            ) from error
        layers = model.layers + 1 if layers < 0 else min(layers, model.layers + 1)
        contexts = []
        for shape in shapes:
            contexts.append(Context(model, cells=shape.cells, sequences=shape.sequences, settings=settings))
            stack.callback(contexts[-1].close)
        if layers <= model.layers:
            use_huge_pages()
        runners = []
        for shape, context in zip(shapes, contexts, strict=True):
            context.warm_up()
            runners.append(_runner(model, context, shape, settings, share=1 / len(shapes)))
        loaded = LoadedModel(model, tokenizer, runners, defaults, layers, files, stack.pop_all().close)
    _say_what_runs_where(loaded, settings)
    return loaded


def _why_no_gpu(settings: EngineSettings) -> str:
    if settings.n_gpu_layers == 0:
        return "--require-gpu asks for a GPU, but --n-gpu-layers 0 puts no layer there; leave one of the two out."
    return (
        "--require-gpu asks for a GPU, but llama.cpp finds none. Check `nvidia-smi`; in a container, also that the"
        " image is the one for CUDA, and that the GPU was given to it (docker run --gpus all; in Kubernetes the chart's"
        " gpu.runtimeClassName, which is nvidia on k3s and RKE2)."
    )


def _runner(
    model: Model, context: Context, shape: ContextShape, settings: EngineSettings, *, share: float
) -> ModelRunner:
    capacity = int((settings.prefix_cache_mib << 20 or available_memory() // 8) * share)
    block_size = max(1, min(BLOCK_SIZE, PER_STEP // context.bytes_per_token))
    window = int(model.metadata("phi3.attention.sliding_window") or 0)
    sizes = None if context.offloaded else measure(context)
    return ModelRunner(
        context,
        max_tokens=shape.max_tokens,
        window=window if 0 < window < model.context_length else None,
        window_chunk=settings.window_chunk,
        host_cache=HostCache(capacity, block_size) if settings.prefix_cache and context.saves else None,
        retain=settings.prefix_cache and context.offloaded,
        sizes=sizes,
        speculation=Speculation.of(settings.speculation, {} if sizes is None else sizes.seconds),
    )


def _defaults(model: Model, tokenizer: Tokenizer) -> ModelDefaults:
    said = json.loads(model.metadata("edge_phi3.generation.config") or "{}")
    generation = said if isinstance(said, dict) else {}
    end = generation.get("eos_token_id")
    ends = [token for token in (end if isinstance(end, list) else [end]) if isinstance(token, int)]
    if not ends:
        ends = [token for text in tokenizer.family.ends if (token := tokenizer.special_token(text)) is not None]
        ends = sorted({*ends, model.eos_token_id} - {-1})
    if any(not 0 <= token < model.vocab_size for token in ends):
        raise ValueError(f"the tokens {ends[:9]} cannot end an answer, for there are {model.vocab_size} tokens")
    pad = generation.get("pad_token_id", model.pad_token_id)
    return ModelDefaults(
        vocab_size=model.vocab_size,
        bos_token_id=model.bos_token_id,
        eos_token_ids=tuple(ends),
        pad_token_id=pad if isinstance(pad, int) and pad >= 0 else model.eos_token_id,
        context_length=model.context_length,
        generation=generation,
    )


def _say_what_runs_where(loaded: LoadedModel, settings: EngineSettings) -> None:
    model, layers = loaded.model, loaded.gpu_layers
    contexts = " + ".join(
        f"{runner.kv.cells} cells" + (f" for sequences up to {runner.max_tokens} tokens" if runner.max_tokens else "")
        for runner in loaded.runners
    )
    logger.info(
        "%s: %s, %.1f MiB; %s; %d threads; KV cache of %s (%s); up to %d sequences at once",
        model.path.name,
        model.description,
        model.size / 2**20,
        f"{layers} of {model.layers + 1} layers on the GPU" if layers else "all layers on the CPU",
        settings.threads or usable_cores(),
        contexts,
        settings.kv_cache_type,
        settings.parallel,
    )
