"""From a GGUF file to a model that is ready to decode: contexts, Phi-3's attention rules, end tokens, warm-up."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_phi3.engine.batch_shapes import measure
from edge_phi3.engine.contexts import context_shapes
from edge_phi3.engine.errors import ModelLoadError
from edge_phi3.engine.prefix_store import PrefixStore
from edge_phi3.engine.runtime import Context, Model, supports_gpu_offload, use_huge_pages
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import RunningRequest
from edge_phi3.engine.settings import EngineSettings, usable_cores
from edge_phi3.engine.solo import SoloScheduler
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.generation.config import ModelDefaults
from edge_phi3.hardware import available_memory

logger = logging.getLogger(__name__)

_BLOCK = 256
"""Tokens of a block of the prefix store: what is copied anew at most when a sequence goes on where another ended."""

PHI3_END_TEXTS = ("<|endoftext|>", "<|assistant|>", "<|end|>")
"""The tokens that end an answer in every Phi-3 ``generation_config.json``, for GGUFs that do not carry one."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with a scheduler for each context.

    Attributes:
        model: weights and vocabulary.
        tokenizer: text to tokens and back.
        schedulers: one, or for Phi-3-128k two: the first takes sequences up to the original context with the short
            rotary factors, the last the longer ones.
        defaults: what the model's ``generation_config.json`` says.
        settings: how it was loaded.
        solo: for the places of `schedulers`, the schedulers of requests that run alone; made when they are wanted.
    """

    model: Model
    tokenizer: Tokenizer
    schedulers: list[Scheduler]
    defaults: ModelDefaults
    settings: EngineSettings
    solo: dict[int, SoloScheduler] = field(default_factory=dict)

    @functools.cached_property
    def token_texts(self) -> list[str | None]:
        """The text of every token, which stop strings are compared with."""
        return self.tokenizer.token_texts

    def solo_for(self, scheduler: Scheduler, request: RunningRequest) -> SoloScheduler:
        """Give the one that runs alone what `scheduler` runs together.

        Raises:
            ModelLoadError: there is no memory for its context.
        """
        place = self.schedulers.index(scheduler)
        if place not in self.solo:
            self.solo[place] = SoloScheduler(
                lambda shape: Context(
                    self.model,
                    cells=shape.cells,
                    sequences=shape.sequences,
                    unified=shape.unified,
                    settings=self.settings,
                ),
                scheduler,
                request,
                # Phi-3-128k's long rotary factors need a context beyond the original one.
                least=1 + (self.schedulers[place - 1].max_tokens or 0) if place else 0,
            )
        return self.solo[place]

    def close(self) -> None:
        """Free contexts and model."""
        for scheduler in [*self.schedulers, *self.solo.values()]:
            scheduler.context.close()
        self.model.close()


def load(settings: EngineSettings) -> LoadedModel:
    """Load and warm up a model.

    Raises:
        ModelLoadError: the file, an adapter or a context cannot be loaded.
    """
    gpu = supports_gpu_offload()
    model = Model(settings.model_path, n_gpu_layers=settings.n_gpu_layers if gpu else 0)
    try:
        for path, scale in settings.lora:
            model.load_lora(path, scale)
        tokenizer = Tokenizer(model)
        schedulers = _make_schedulers(model, settings)
    except BaseException:
        model.close()
        raise
    loaded = LoadedModel(model, tokenizer, schedulers, _defaults(model, tokenizer), settings)
    _say_what_runs_where(loaded, settings, gpu=gpu)
    return loaded


def _make_schedulers(model: Model, settings: EngineSettings) -> list[Scheduler]:
    window = _sliding_window(model)
    shapes = context_shapes(settings, model.context_length, _original_context(model))
    capacity = (settings.prefix_cache_mib << 20 or available_memory() // 8) // len(shapes)
    contexts = [
        Context(model, cells=shape.cells, sequences=shape.sequences, unified=shape.unified, settings=settings)
        for shape in shapes
    ]
    use_huge_pages()
    schedulers = []
    for shape, context in zip(shapes, contexts, strict=True):
        context.warm_up()
        # Only a unified cache can take a sequence apart; from the others it is saved whole.
        block_size = _BLOCK if shape.unified else None
        schedulers.append(
            Scheduler(
                context,
                parallel=settings.parallel,
                window=window,
                window_chunk=settings.window_chunk,
                store=PrefixStore(capacity, block_size) if settings.prefix_cache and context.saves else None,
                share=settings.prefix_cache,
                max_tokens=shape.max_tokens,
                shapes=measure(context.decode_anything, min(context.sequences, context.batch_size)),
            )
        )
    return schedulers


def _sliding_window(model: Model) -> int | None:
    """Give how many tokens Phi-3's attention reaches back, or None when the context is no longer than that."""
    window = int(model.metadata("phi3.attention.sliding_window") or 0)
    return window if 0 < window < model.context_length else None


def _original_context(model: Model) -> int | None:
    """Give the context beyond which the long rotary factors hold, or None for a model without them."""
    original = int(model.metadata("phi3.rope.scaling.original_context_length") or 0)
    return original if 0 < original < model.context_length else None


def _defaults(model: Model, tokenizer: Tokenizer) -> ModelDefaults:
    generation = _generation_config(model)
    end = generation.get("eos_token_id")
    ends = [token for token in (end if isinstance(end, list) else [end]) if isinstance(token, int)]
    if not ends:
        ends = [token for text in PHI3_END_TEXTS if (token := tokenizer.special_token(text)) is not None]
        ends = sorted({*ends, model.eos_token_id} - {-1})
    pad = generation.get("pad_token_id")
    return ModelDefaults(
        vocab_size=model.vocab_size,
        bos_token_id=model.bos_token_id,
        eos_token_ids=tuple(ends),
        pad_token_id=pad if isinstance(pad, int) else model.eos_token_id,
        context_length=model.context_length,
        generation=generation,
    )


def _generation_config(model: Model) -> Mapping[str, object]:
    text = model.metadata("edge_phi3.generation.config")
    if not text:
        return {}
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelLoadError(f"{model.path}: edge_phi3.generation.config is not JSON ({error}).") from error
    return config if isinstance(config, dict) else {}


def _say_what_runs_where(loaded: LoadedModel, settings: EngineSettings, *, gpu: bool) -> None:
    model = loaded.model
    layers = model.layers + 1 if settings.n_gpu_layers < 0 else min(settings.n_gpu_layers, model.layers + 1)
    contexts = " + ".join(f"{s.kv.cells} cells" for s in loaded.schedulers)
    logger.info(
        "%s: %s, %.1f MiB; %s; %d threads; KV cache of %s (%s); up to %d sequences at once",
        model.path.name,
        model.description,
        model.size / 2**20,
        f"{layers} of {model.layers + 1} layers on the GPU" if gpu else "all layers on the CPU",
        settings.threads or usable_cores(),
        contexts,
        settings.kv_cache_type,
        settings.parallel,
    )
