"""Engines on small converted checkpoints, and a short way to run one request."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.sequence import FinishedEvent
from tests.golden import attention
from tests.golden.asked import Asked

__all__ = ["Asked", "MakeModel", "ask", "engine_at_rest", "generated", "running_engine"]

MakeModel = Callable[[str], Path]

OPTIONS = "TEST_ENGINE_OPTIONS"
"""Environment variable: options, in JSON, of all engines whose test asks for nothing else (`tests/offload`)."""


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
    """Yield a loaded engine with exact settings; audit its KV cells at the end."""
    everywhere = json.loads(os.environ.get(OPTIONS, "{}"))
    settings = {"kv_cache_type": "f32", "threads": 2, "window_chunk": 1, "exit_on_stall": False} | everywhere | options
    engine = Engine(EngineSettings(path, **settings))
    loaded = engine.load()
    try:
        yield engine
        if engine.status == "ready":
            with engine_at_rest(engine):
                for runner in loaded.runners:
                    runner.kv.audit()
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

    core.step = rest
    core.wake()
    assert rests.wait(600)
    try:
        yield
    finally:
        core.step = step
        go.set()


def ask(engine: Engine, prompt: NDArray[np.int32], **kwargs: Any) -> list[list[int]]:
    """Run one request to its end, and return the generated tokens of each returned sequence."""
    return generated(Asked(engine, prompt, **kwargs).finished())


def generated(event: FinishedEvent) -> list[list[int]]:
    """Return the generated tokens of each returned sequence."""
    return [sequence[event.result.prompt_length :].tolist() for sequence in event.result.sequences]
