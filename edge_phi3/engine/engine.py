"""The engine: one thread that decodes, and its asyncio face.

The thread owns the llama.cpp contexts. What the event loop wants arrives in one thread-safe inbox; what the thread has
to say leaves through an `Outbox`. What it does in between is `edge_phi3.engine.stepper`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Literal

from edge_phi3.engine.delivery import Outbox
from edge_phi3.engine.errors import (
    EngineStoppedError,
    ModelLoadError,
    QueueFullError,
    RequestTooLargeError,
)
from edge_phi3.engine.loader import LoadedModel, load
from edge_phi3.engine.scheduler import Scheduler
from edge_phi3.engine.sequence import Event, GenerationRequest, RunningRequest, TokensEvent
from edge_phi3.engine.settings import EngineSettings
from edge_phi3.engine.solo import SoloScheduler, no_memory
from edge_phi3.engine.stats import EngineStats
from edge_phi3.engine.stepper import Stepper
from edge_phi3.generation import make_decoder

logger = logging.getLogger(__name__)

Status = Literal["loading", "ready", "draining", "broken", "stopped"]

_SWITCH_INTERVAL = 0.0005
"""Seconds after which a waiting thread may take the interpreter lock (Python's default is 0.005): the engine's thread
asks for it after every decode, and must not wait for the event loop's whole turn."""


class Engine:
    """Runs many requests on one model.

    Args:
        settings: the model and how to run it.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.status: Status = "loading"
        self.status_detail = "The model is loading."
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox = Outbox(settings.stream_interval)
        self._arrivals = itertools.count()
        self._loading: Future[LoadedModel] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._closing = threading.Lock()
        self._loaded: LoadedModel | None = None
        self._unadmitted = 0
        self._prompt_tokens = 0
        self._stepper = Stepper(
            self._outbox, self._enqueue, wanted=lambda: not self._inbox.empty(), stopping=lambda: self._stopping
        )

    # -- life

    def load(self) -> LoadedModel:
        """Start the engine's thread, and wait until it has loaded the model and warmed it up.

        Raises:
            ModelLoadError: the model cannot be loaded.
        """
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        self._thread.start()
        return self._loading.result()

    async def start(self) -> LoadedModel:
        """Do what `load` does without blocking the event loop."""
        return await asyncio.to_thread(self.load)

    async def drain(self, grace: float) -> None:
        """Take no more requests, wait up to `grace` seconds for the running ones, end the rest, and free the model."""
        if self.status in {"ready", "loading"}:
            self._set_status("draining", "The service is stopping.")
        end = time.monotonic() + grace
        while self._busy() and time.monotonic() < end:  # noqa: ASYNC110 - polling spares the hot path a signal
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Stop at once: the running decode call is aborted, unfinished requests get `EngineStoppedError`."""
        self._stopping = True
        for scheduler in self._schedulers():
            scheduler.context.abort()
        # A second signal may close while the first still drains: only one may free the model.
        with self._closing:
            self._inbox.put(_nothing)
            if self._thread.is_alive():
                self._thread.join()
            self._set_status("stopped", "The engine is stopped.")
            loaded, self._loaded = self._loaded, None
            if loaded is not None:
                loaded.close()

    def _set_status(self, status: Status, detail: str) -> None:
        self.status, self.status_detail = status, detail

    def _busy(self) -> bool:
        stats = self.stats()
        return bool(stats.waiting or stats.running)

    def _schedulers(self) -> list[Scheduler]:
        loaded = self._loaded  # read once: another thread may be closing
        return [*loaded.schedulers, *loaded.solo.values()] if loaded else []

    @property
    def model(self) -> LoadedModel:
        """The loaded model.

        Raises:
            EngineStoppedError: it is not loaded.
        """
        loaded = self._loaded
        if loaded is None:
            raise EngineStoppedError(self.status_detail or "The model is not loaded.")
        return loaded

    def stats(self) -> EngineStats:
        """Give the engine's counters and gauges; from any thread, without waiting."""
        schedulers = self._schedulers()
        # Those of requests with a seed come and grow: what --ctx-size gives stays what it is.
        shared = [scheduler for scheduler in schedulers if not isinstance(scheduler, SoloScheduler)]
        stores = [scheduler.store for scheduler in schedulers if scheduler.store is not None]
        return EngineStats(
            waiting=self._unadmitted + sum(len(scheduler.waiting) for scheduler in schedulers),
            running=sum(len(scheduler.running) for scheduler in schedulers),
            sequences=sum(scheduler.pool.held for scheduler in schedulers),
            cells_used=sum(scheduler.kv.used for scheduler in shared),
            cells_total=sum(scheduler.kv.cells for scheduler in shared),
            stored_tokens=sum(store.tokens for store in stores),
            stored_bytes=sum(store.used for store in stores),
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=self._stepper.cached_tokens,
            generated_tokens_total=self._stepper.generated_tokens,
            preemptions_total=sum(scheduler.preemptions for scheduler in schedulers),
            steps_total=self._stepper.steps,
        )

    # -- the asyncio face

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Run a request.

        Closing the iterator early, or cancelling the task that reads it, frees the request's sequences within one step.

        Yields:
            `TokensEvent`s when the request streams, then one `FinishedEvent`.

        Raises:
            RequestTooLargeError: it can never fit this engine.
            QueueFullError: too many requests wait.
            DeadlineExceededError: its time limit passed.
            DecodeFailedError: llama.cpp failed on it.
            EngineStoppedError: the engine is stopping or broken.
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
        if self.status != "ready":
            raise EngineStoppedError(self.status_detail)
        loaded = self.model
        decoder = make_decoder(
            request.config, request.prompt_ids, vocabulary=loaded.token_texts, constraint=request.constraint
        )
        alone = request.config.seed is not None and not self.settings.batch_seeded
        running = RunningRequest(request, decoder, send, next(self._arrivals), alone=alone)
        self._refuse_what_never_fits(running)
        if self.stats().waiting >= self.settings.max_queue:
            raise QueueFullError(f"The queue is full ({self.settings.max_queue} requests wait); try again later.")
        self._unadmitted += 1
        self._inbox.put(lambda: self._accept(running))
        return running

    def cancel(self, running: RunningRequest) -> None:
        """Give up a request, from any thread; its sequences are freed before the next batch."""
        running.cancelled = True
        self._inbox.put(_nothing)

    def _refuse_what_never_fits(self, running: RunningRequest) -> None:
        scheduler = self._scheduler_for(running.max_length)
        if running.rows > scheduler.parallel:
            raise RequestTooLargeError(
                f"num_beams or num_return_sequences asks for {running.rows} sequences at once; "
                f"this server decodes at most {scheduler.parallel}."
            )
        needed, cells = scheduler.most_cells(running), scheduler.kv.cells
        if needed > cells:
            raise RequestTooLargeError(
                f"The request may need {needed} KV cells ({running.prompt_length} prompt tokens, max_length "
                f"{running.max_length}, {running.rows} sequences); this server has {cells}. "
                "Lower max_length or max_new_tokens."
            )
        if not scheduler.fits(running.max_length):
            raise RequestTooLargeError(
                f"The request may become {running.max_length} tokens long (max_length); this server has "
                f"{scheduler.kv.cells_per_sequence} KV cells for each sequence. Lower max_length or max_new_tokens."
            )

    def _scheduler_for(self, length: int) -> Scheduler:
        """Give the context for a sequence of `length` tokens: the last one takes any length."""
        schedulers = self.model.schedulers
        for scheduler in schedulers:
            if scheduler.max_tokens is None or length <= scheduler.max_tokens:
                return scheduler
        return schedulers[-1]

    def _enqueue(self, running: RunningRequest, length: int) -> None:
        """Put a request into the queue of the context where its sequences of `length` tokens belong."""
        scheduler = self._scheduler_for(length)
        if running.alone:
            try:
                scheduler = self.model.solo_for(scheduler, running)
            except ModelLoadError as error:
                running.send(no_memory(error))
                return
        scheduler.enqueue(running)

    # -- the engine's thread

    def _run(self) -> None:
        """Load, and decode until the engine stops.

        Both happen in this one thread: OpenMP keeps a team of workers for every thread that ever computed, and lets
        all workers sleep at each barrier as soon as they outnumber the cores. A model that was warmed up by another
        thread decodes at half the speed.
        """
        try:
            loaded = self._loaded = load(self.settings)
        except BaseException as error:  # noqa: BLE001 - whoever waits for `load` gets it
            self._set_status("broken", str(error))
            self._loading.set_exception(error)
            return
        if not self._stopping:
            self._set_status("ready", "")
        self._loading.set_result(loaded)
        try:
            while not self._stopping:
                self._read_inbox(wait=not any(s.waiting or s.running for s in self._schedulers()))
                schedulers = self._schedulers()
                busy = [scheduler for scheduler in schedulers if scheduler.running or scheduler.waiting]
                for scheduler in busy:
                    self._stepper.step(scheduler, repeat=len(busy) == 1)
                self._tidy_up(schedulers)
        except BaseException as error:
            logger.exception("The engine stops: it met an error that it cannot recover from.")
            self._set_status("broken", f"The engine is broken: {error}")
        finally:
            self._read_inbox(wait=False)
            stopped = EngineStoppedError(self.status_detail or "The service is stopping.")
            for scheduler in self._schedulers():
                for running in [*scheduler.running, *scheduler.waiting]:
                    running.send(stopped)
                scheduler.running.clear()
                scheduler.waiting.clear()
            self._outbox.flush()

    def _tidy_up(self, schedulers: list[Scheduler]) -> None:
        """Free the cells of those who have finished; they hear of it first."""
        unsettled = [scheduler.pool for scheduler in schedulers if scheduler.pool.unsettled]
        if unsettled or not any(scheduler.running for scheduler in schedulers):
            self._outbox.flush()
        for pool in unsettled:
            pool.settle()

    def _read_inbox(self, *, wait: bool) -> None:
        if wait:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get_nowait()()

    def _accept(self, running: RunningRequest) -> None:
        self._unadmitted -= 1
        self._prompt_tokens += running.prompt_length
        self._enqueue(running, running.prompt_length)


def _nothing() -> None:
    """Wake the engine's thread."""
