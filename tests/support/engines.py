"""Loaded engines, and requests to them whose events are collected. Needs no pytest."""

import contextlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import ArrayLike

from edge_phi3.engine import loader
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest
from edge_phi3.generation import API_DEFAULTS, GenerationResult
from edge_phi3.generation.config import GenerationConfig
from tests.golden.generation_data import Answer, differences
from tests.golden.requests import Request
from tests.support.cores import Foreseen, audit

MakeModel = Callable[[str], Path]
"""What the fixture `make_model` is: a name of `tests.golden.attention.MODELS` -> an F32 GGUF."""

OPTIONS = "TEST_ENGINE_OPTIONS"
"""Environment variable: options, in JSON, of all engines whose test asks for nothing else (`tests/offload`)."""


class Asked:
    """A submitted request whose events are collected; greedy and of no length unless told otherwise.

    `top_logprobs`, `scored_prompt` and `adapter` are those of `GenerationConfig` and `GenerationRequest`.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: ArrayLike,
        *,
        stream: bool = False,
        top_logprobs: int | None = None,
        scored_prompt: int | None = None,
        adapter: int = 0,
        **kwargs: Any,
    ) -> None:
        config = GenerationConfig.resolve({"do_sample": False, "max_length": None} | kwargs, engine.model.defaults)
        config = replace(config, top_logprobs=top_logprobs)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        tokens = np.asarray(prompt, np.int32)
        self.request = GenerationRequest(tokens, config, stream, scored_prompt=scored_prompt, adapter=adapter)
        self.running = engine.submit(self.request, self.events.put)

    def finished(self, timeout: float = 600.0) -> FinishedEvent:
        """Wait for the end; an error that the engine sent is raised."""
        while True:
            event = self.events.get(timeout=timeout)
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, FinishedEvent):
                return event


@contextlib.contextmanager
def running_engine(path: Path, **options: Any) -> Iterator[Engine]:
    """Yield a loaded engine with exact settings, whose KV cells are audited after every step."""
    everywhere = json.loads(os.environ.get(OPTIONS, "{}"))
    settings = {"kv_cache_type": "f32", "threads": 2, "window_chunk": 1, "exit_on_stall": False} | everywhere | options
    engine = Engine(EngineSettings(path, **settings))
    runners = engine.load().runners
    failures: list[AssertionError] = []
    core = engine._core
    assert core is not None
    step = core.step

    def audited_step() -> None:
        step()
        if not core._aborted:  # nobody knows what a decode call has done that was aborted
            try:
                for runner in runners:
                    audit(runner.kv)
            except AssertionError as error:
                failures.append(error)

    core.step = audited_step  # type: ignore[method-assign]
    try:
        yield engine
        assert failures == []
    finally:
        engine.close()


@contextlib.contextmanager
def engine_at_rest(engine: Engine) -> Iterator[None]:
    """Keep the engine's thread from its next step, so that what is asked meanwhile arrives at once."""
    core, go, rests = engine._core, threading.Event(), threading.Event()
    assert core is not None
    step = core.step

    def rest() -> None:
        rests.set()
        go.wait(600)
        step()

    try:
        with mock.patch.object(core, "step", rest):
            core.wake()
            assert rests.wait(600)
            yield
    finally:
        go.set()


def ask(engine: Engine, prompt: ArrayLike, **kwargs: Any) -> list[list[int]]:
    """Run one request to its end, and return the generated tokens of each returned sequence."""
    return generated(Asked(engine, prompt, **kwargs).finished())


def generated(event: FinishedEvent) -> list[list[int]]:
    return [sequence[event.result.prompt_length :].tolist() for sequence in event.result.sequences]


def rules_of(path: Path, texts: Sequence[str]) -> tuple[list[list[int]], list[object]]:
    """Return what a GGUF makes of texts, and what it says beside: special tokens, ends, padding, contexts."""
    settings = EngineSettings(path, ctx_size=8192, parallel=2, threads=1)
    # The speed of batches is of no matter here, and slow to measure.
    with mock.patch.object(loader, "measure", return_value=None), contextlib.closing(loader.load(settings)) as loaded:
        tokenizer, defaults = loaded.tokenizer, loaded.defaults
        runners = [(runner.kv.cells, runner.max_tokens, runner.window.size) for runner in loaded.runners]
        ends = [defaults.bos_token_id, {*defaults.eos_token_ids}, defaults.pad_token_id, tokenizer.special_tokens]
        return [tokenizer.encode(text).tolist() for text in texts], [tokenizer.special_ids, ends, runners]


@dataclass(frozen=True)
class Compared:
    """A request, transformers' answer, ours, and the token that ours is padded with."""

    request: Request
    theirs: Answer
    ours: GenerationResult
    pad: int

    @property
    def differences(self) -> list[str]:
        """Return in what the answers differ."""
        return differences(self.ours, self.request, self.theirs, self.pad)


def compared(engine: Engine, answered: Sequence[tuple[Request, Answer]]) -> list[Compared]:
    """Run requests that transformers has answered, all at once; return our answers beside theirs."""
    usual: dict[str, Any] = {**API_DEFAULTS}
    scored = {"output_scores": True, "return_dict_in_generate": True}
    asked = [Asked(engine, each.prompt, **usual | each.kwargs | scored) for each, _ in answered]
    for (_, theirs), running in zip(answered, asked, strict=True):
        running.running.drafting = Foreseen(theirs.sequences, wrong=3)
    found = []
    for (request, theirs), running in zip(answered, asked, strict=True):
        pad = running.request.config.pad_token_id
        assert pad is not None
        found.append(Compared(request, theirs, running.finished().result, pad))
    return found
