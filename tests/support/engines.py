"""A request to a running engine, for whoever compares its answers with the recorded ones."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from edge_phi3.engine.engine import Engine
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest
from edge_phi3.generation.config import GenerationConfig


class Asked:
    """A submitted request whose events are collected; greedy and of no length unless told otherwise."""

    def __init__(self, engine: Engine, prompt: ArrayLike, *, stream: bool = False, **kwargs: Any) -> None:
        config = GenerationConfig.resolve({"do_sample": False, "max_length": None} | kwargs, engine.model.defaults)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.request = GenerationRequest(np.asarray(prompt, np.int32), config, stream=stream)
        self.running = engine.submit(self.request, self.events.put)

    def finished(self, timeout: float = 600.0) -> FinishedEvent:
        """Wait for the end; an error that the engine sent is raised."""
        while True:
            event = self.events.get(timeout=timeout)
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, FinishedEvent):
                return event
