"""Engines on small converted checkpoints, and a short way to ask them."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest
from edge_phi3.engine.settings import EngineSettings
from edge_phi3.generation.config import GenerationConfig
from tests.golden import attention

MakeModel = Callable[[str], Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Convert the random checkpoint "4k" or "128k" to an F32 GGUF, once a run."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            attention.write_model(folder, name)
            made[name] = convert(folder, folder / f"{name}.gguf", outtype="f32").path
        return made[name]

    return make


@contextlib.contextmanager
def running_engine(path: Path, **options: Any) -> Iterator[Engine]:
    """Give a loaded engine with exact settings; audit its books at the end."""
    settings = {"kv_cache_type": "f32", "threads": 2, "window_chunk": 1} | options
    engine = Engine(EngineSettings(path, **settings))
    loaded = engine.load()
    try:
        yield engine
    finally:
        engine.close()
    for scheduler in loaded.schedulers:
        scheduler.kv.audit()


class Asked:
    """A submitted request whose events are collected."""

    def __init__(self, engine: Engine, prompt: NDArray[np.int32], *, stream: bool = False, **kwargs: Any) -> None:
        config = GenerationConfig.resolve({"do_sample": False, "max_length": None} | kwargs, engine.model.defaults)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.request = GenerationRequest(prompt, config, stream=stream)
        self.running = engine.submit(self.request, self.events.put)

    def finished(self, timeout: float = 120.0) -> FinishedEvent:
        """Wait for the end; an error that the engine sent is raised."""
        while True:
            event = self.events.get(timeout=timeout)
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, FinishedEvent):
                return event


def ask(engine: Engine, prompt: NDArray[np.int32], **kwargs: Any) -> list[list[int]]:
    """Run one request to its end, and give the generated tokens of each returned sequence."""
    return generated(Asked(engine, prompt, **kwargs).finished())


def generated(event: FinishedEvent) -> list[list[int]]:
    """Give the generated tokens of each returned sequence."""
    return [sequence[event.result.prompt_length :].tolist() for sequence in event.result.sequences]
