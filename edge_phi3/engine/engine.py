"""The engine: a model, one thread that decodes, and its asyncio face.

The thread owns the llama.cpp contexts. What it does is `edge_phi3.engine.core`'s; this is its life, from loading the
model to freeing it, and what others see of it meanwhile.
"""

import asyncio
import bisect
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal

from edge_phi3.engine.core import EngineCore
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.errors import EngineStoppedError
from edge_phi3.engine.events import EventBatcher
from edge_phi3.engine.loader import LoadedModel, load
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import Event, GenerationRequest, RunningRequest, TokensEvent
from edge_phi3.engine.stats import EngineStats
from edge_phi3.engine.watchdog import Watchdog, stacks
from edge_phi3.system_resources import give_back_memory

logger = logging.getLogger(__name__)

Status = Literal["loading", "ready", "draining", "stalled", "broken", "stopped"]

_SWITCH_INTERVAL = 0.0005
"""Seconds after which a waiting thread may take the interpreter lock (Python's default is 0.005): the engine's thread
asks for it after every decode, and must not wait for the event loop's whole turn."""

_PATIENCE = 30.0
"""Seconds that the engine's thread has to end once its decode call is aborted."""
_LAST_SECONDS = 2.0
"""What of a grace period is kept back for that, at most."""


class Engine:
    """Runs many requests on one model. `status_detail` is a sentence about its status; empty while it is ready."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.status: Status = "loading"
        self.status_detail = "The model is loading."
        self._outbox = EventBatcher(settings.stream_interval)
        self._loading: Future[LoadedModel] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._closing = threading.Lock()
        self._loaded: LoadedModel | None = None
        self._core: EngineCore | None = None
        self._watchdog: Watchdog | None = None

    # -- life

    def load(self) -> LoadedModel:
        """Start the engine's thread, and wait until it has loaded the model, or raise `ModelLoadError`."""
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        self._thread.start()
        return self._loading.result()

    async def start(self) -> LoadedModel:
        """Do what `load` does without blocking the event loop."""
        return await asyncio.to_thread(self.load)

    async def drain(self, grace: float) -> None:
        """Take no more requests, let those that run finish, end the rest, and free the model within `grace` seconds."""
        if self.status in {"ready", "loading"}:
            self.status, self.status_detail = "draining", "The service is stopping."
        last = min(_LAST_SECONDS, grace / 2)
        end = time.monotonic() + grace - last
        while self._core is not None and self._core.in_flight and time.monotonic() < end:  # noqa: ASYNC110 - spares the hot path a signal
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.close, last)

    def close(self, patience: float = _PATIENCE) -> bool:
        """Stop at once: the running decode call is aborted, unfinished requests get `EngineStoppedError`.

        Return whether the engine's thread has ended within `patience` seconds. If not, nothing is freed under it.
        """
        self._stopping = True
        core = self._core
        if core is not None:
            core.abort()
        # A second signal may close while the first still drains: only one may free the model.
        with self._closing:
            if self._thread.is_alive():
                self._thread.join(patience)
            self.status, self.status_detail = "stopped", "The engine is stopped."
            if self._thread.is_alive():
                if core is not None:
                    core.abandon("The service is stopping.")
                return False
            loaded, self._loaded, self._core = self._loaded, None, None
            if loaded is not None:
                loaded.close()
        return True

    @property
    def model(self) -> LoadedModel:
        """The loaded model; `EngineStoppedError` where it is not loaded."""
        loaded = self._loaded
        if loaded is None:
            raise EngineStoppedError(self.status_detail or "The model is not loaded.")
        return loaded

    def stats(self) -> EngineStats:
        """Return the engine's counters and gauges; from any thread, without waiting."""
        core, loaded = self._core, self._loaded  # read once: another thread may be closing
        if core is None or loaded is None:
            return EngineStats()
        runners = core.scheduler.runners
        stores = [runner.kv.host_cache for runner in runners if runner.kv.host_cache is not None]
        return EngineStats(
            waiting=core.waiting,
            running=len(core.scheduler.running),
            sequences=sum(len(request.sequences) for request in core.scheduler.running),
            cells_used=sum(runner.kv.used for runner in runners),
            cells_total=sum(runner.kv.cells for runner in runners),
            stored_tokens=sum(store.tokens for store in stores),
            stored_bytes=sum(store.used for store in stores),
            totals=replace(core.totals),
            preemptions_total=core.scheduler.preemptions,
            steps_total=core.steps,
            gpu_layers=loaded.gpu_layers,
            cpu_layers=loaded.model.layers + 1 - loaded.gpu_layers,
            device_times=core.device_times,
            host_times=core.host_times,
        )

    # -- the asyncio face

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Run a request; yield `TokensEvent`s when it streams, then one `FinishedEvent`.

        Closing the iterator early, or cancelling the task that reads it, frees the request's sequences within one step.

        Raises:
            EngineError: what `submit` raises, or its time limit passed (`DeadlineExceededError`).
            DecodeFailedError: llama.cpp failed on it.
            InternalError: an error of ours, or a stall.
        """
        loop = asyncio.get_running_loop()
        mailbox: asyncio.Queue[Event] = asyncio.Queue()
        running = self.submit(request, lambda event: self._outbox.post(loop, mailbox, event))
        finished = False
        try:
            while not finished:
                event = await mailbox.get()
                finished = not isinstance(event, TokensEvent)
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            if not finished:
                self.cancel(running)

    def submit(self, request: GenerationRequest, send: Callable[[Event], None]) -> RunningRequest:
        """Queue a request, from any thread. `send` is called from the engine's thread.

        Raises:
            RequestTooLargeError: it can never fit this engine.
            QueueFullError: too many requests wait.
            EngineStoppedError: the engine is not ready.
        """
        core = self._core
        if self.status != "ready" or core is None:
            raise EngineStoppedError(self.status_detail)
        return core.submit(request, send)

    def cancel(self, running: RunningRequest) -> None:
        """Cancel a request, from any thread; its sequences are freed before the next batch."""
        core = self._core
        if core is not None:
            core.cancel(running)

    def room(self, prompt_length: int, rows: int) -> int:
        """Return how many tokens a prompt may be continued by in each of so many sequences."""
        most, core = self.model.defaults.context_length - prompt_length, self._core
        return core.scheduler.room(prompt_length, rows, most) if core else 0

    @functools.cached_property
    def max_length(self) -> int:
        """The length that a prompt must stay below: the smaller of the trained one and what one sequence can hold."""
        lengths, core = range(1, self.model.defaults.context_length + 1), self._core
        assert core is not None
        return bisect.bisect_left(lengths, True, key=lambda length: core.scheduler.room(length, 1, 1) < 1)

    # -- the engine's thread

    def _run(self) -> None:
        """Load, and decode until the engine stops.

        Both happen in this one thread: OpenMP keeps a team of workers for every thread that ever computed, and lets
        all workers sleep at each barrier as soon as they outnumber the cores. A model that was warmed up by another
        thread decodes at half the speed.
        """
        settings = self.settings
        try:
            loaded = self._loaded = load(settings)
            scheduler = Scheduler(
                loaded.runners,
                parallel=settings.parallel,
                share_prefixes=settings.prefix_cache,
                exact_seeds=settings.exact_seeds,
            )
            core = self._core = EngineCore(
                scheduler,
                self._outbox,
                max_queue=settings.max_queue,
                token_texts=lambda: loaded.tokenizer.token_texts,
            )
        except BaseException as error:  # noqa: BLE001 - whoever waits for `load` gets it
            self.status, self.status_detail = "broken", str(error)
            self._loading.set_exception(error)
            return
        if not self._stopping:
            self.status, self.status_detail = "ready", ""
        watchdog = self._watchdog = Watchdog(
            settings.stall_timeout or threading.TIMEOUT_MAX,
            steps=lambda: core.turns if core.has_work else None,
            stalled=lambda seconds: self._stalled(core, seconds),
            recovered=self._recovered,
            lost=self._lost,
        )
        if settings.stall_timeout:
            watchdog.start()
        loaded.files.watch(lambda sentence: self._file_changed(core, sentence))
        self._loading.set_result(loaded)
        try:
            while not self._stopping:
                if not core.has_work:
                    core.wait(give_back_memory)
                core.step()
        except BaseException as error:
            logger.exception("The engine stops: it met an error that it cannot recover from.")
            self.status, self.status_detail = "broken", f"The engine is broken: {error}"
        finally:
            watchdog.close()
            core.stop(self.status_detail or "The service is stopping.")

    # -- when the thread does not come back

    def _stalled(self, core: EngineCore, seconds: float) -> None:
        logger.critical("No step has ended for %.0f s. The threads are here:\n%s", seconds, stacks())
        if self.status == "ready":
            self.status, self.status_detail = "stalled", f"The engine has completed no step for {seconds:.0f} s."
        core.abandon(f"The engine has completed no step for {seconds:.0f} s.")

    def _recovered(self) -> None:
        logger.warning("The engine goes on.")
        if self.status == "stalled":
            self.status, self.status_detail = "ready", ""

    def _file_changed(self, core: EngineCore, sentence: str) -> None:
        self.status, self.status_detail = "broken", sentence
        core.abandon(sentence)
        self._give_up(sentence)

    def _lost(self) -> None:
        if self.settings.exit_on_stall:
            self._give_up("The engine does not come back: the process ends.")

    def _give_up(self, sentence: str) -> None:
        logger.critical("%s", sentence)
        if self.settings.exit_on_stall:
            logging.shutdown()
            os._exit(1)
