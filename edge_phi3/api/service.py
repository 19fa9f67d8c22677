"""What the handlers share: where requests are prepared, the pipeline once it is loaded, and how well the service is."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future as Work
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar

import msgspec
from litestar import Request

from edge_phi3.api.errors import InvalidRequestError, RefusedError
from edge_phi3.api.exchange import Exchange, cancelled_when_client_leaves
from edge_phi3.api.guards import KeyRing
from edge_phi3.api.metrics import ServiceMetrics
from edge_phi3.engine.errors import DeadlineExceededError
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.pipeline import GenerationOutput, PreparedPrompt, TextDelta, TextGenerationPipeline
from edge_phi3.settings import Settings

Say = Callable[[str], None]
"""Takes a sentence about how far the loading is; raises `LoadCancelledError` when the service is stopping."""

Loader = Callable[[Say], TextGenerationPipeline]
"""Makes the pipeline, however long that takes: downloads, converts, quantises, loads."""

Result = TypeVar("Result")

_STOPPING: Final = "The service is stopping."

LONG: Final = 32 << 10
LONGEST: Final = 512 << 10
"""Bytes of a body that is no longer prepared on the event loop, where it would take ten to twenty milliseconds on two
cores of an EPYC, and of one that goes into the lane of the largest."""
THREADS: Final = {"long": 4, "longest": 1, "foreign": 1}
"""How many bodies each lane prepares at once; in the last are those for chat templates that run apart."""


class LoadCancelledError(EdgePhi3Error):
    """The service is stopping, so the model is not loaded to the end."""


class Lanes:
    """Where requests are prepared: parsing, templates, tokens, schemas; each within `timeout` seconds, 0 for no limit.

    What a small body asks for is done at once, on the event loop. Everything else is done by a few threads, in lanes,
    so that neither the event loop nor smaller bodies wait for the largest.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lanes = {name: ThreadPoolExecutor(count, f"{name} bodies") for name, count in THREADS.items()}
        self._running: set[Work[Any]] = set()
        self._closed = False

    async def prepare(
        self,
        request: Request[Any, Any, Any],
        body: bytes,
        work: Callable[[], Result],
        *,
        slow: bool = False,
        foreign: bool = False,
    ) -> Result:
        """Return what `work` returns; `slow` work is none for the event loop, `foreign` work has its own lane.

        What nobody waits for any more is not begun. `ClientDisconnectedError`, `DeadlineExceededError` or, when the
        service is stopping, `RefusedError` end the waiting.
        """
        if len(body) < LONG and not slow and not foreign:
            return work()
        if self._closed:
            raise RefusedError(503, _STOPPING)
        lane = self._lanes["longest" if len(body) >= LONGEST else "foreign" if foreign else "long"]
        running = lane.submit(work)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        try:
            async with cancelled_when_client_leaves(request.receive), asyncio.timeout(self._timeout or None):
                return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            raise RefusedError(503, _STOPPING) from None
        except TimeoutError:
            raise DeadlineExceededError(
                f"The request was not prepared within {self._timeout:g} s (--request-timeout)."
            ) from None

    def close(self, patience: float) -> bool:
        """Begin nothing more, and wait for what runs; return whether it has ended within so many seconds."""
        self._closed = True
        for lane in self._lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)
        return not wait(list(self._running), patience).not_done


class Service:
    """The state of one application, whose model `start` loads in a thread of its own.

    `loaded` is None until then; `failure` is what ended the loading, if anything did.
    """

    def __init__(self, settings: Settings, load: Loader) -> None:
        self.settings, self._timeout = settings, settings.request_timeout or None
        self.keys = KeyRing(settings.keys)
        self.metrics = ServiceMetrics(
            settings.metrics_prefix, lambda: self.loaded.engine.stats() if self.loaded else None
        )
        self.failure: BaseException | None = None
        self.lanes = Lanes(settings.request_timeout)
        self._loading = threading.Thread(target=self._run_load, args=[load], name="load", daemon=True)
        self._progress = "The model is loading."
        self.loaded: TextGenerationPipeline | None = None
        self._stopping = False
        self._closed = threading.Event()

    # -- life

    def start(self) -> None:
        """Begin to load the model, and to follow the file of keys, and return at once."""
        self._loading.start()
        path = self.settings.api_key_file
        if path is not None and path.is_file():
            following = (path, self.settings.read_keys, self._closed)
            threading.Thread(target=self.keys.follow, args=following, name="keys", daemon=True).start()

    def _run_load(self, load: Loader) -> None:
        try:
            pipeline = load(self._say)
            self.metrics.model = pipeline.model
            # What there is now stays: the garbage collector would look over all of it now and then, for 20 ms during
            # which nobody else has the interpreter.
            gc.collect()
            gc.freeze()
            self.loaded = pipeline
        except LoadCancelledError:
            return
        except BaseException as error:  # noqa: BLE001 - the server ends with it, in its own thread
            self.failure = error

    def _say(self, progress: str) -> None:
        if self._stopping:
            raise LoadCancelledError(_STOPPING)
        self._progress = progress

    async def drain(self) -> None:
        """Take no more requests, let the running ones finish within the grace period, and end the rest."""
        self._stopping = True
        if self.loaded is not None:
            await self.loaded.engine.drain(self.settings.grace_period)

    def close(self, patience: float = 2.0) -> bool:
        """Stop at once, waiting `patience` seconds each for what is prepared, the loading, and the engine.

        Return whether everything has stopped: a step of any of them may still go on.
        """
        self._stopping = True
        self._closed.set()
        prepared = self.lanes.close(patience)
        if self._loading.is_alive():
            self._loading.join(patience)
        stopped = self.loaded is None or self.loaded.engine.close(patience)
        return prepared and stopped and not self._loading.is_alive()

    # -- how well it is

    @property
    def is_ready(self) -> bool:
        """Whether requests for text are taken."""
        return not self._stopping and self.loaded is not None and self.loaded.engine.status == "ready"

    @property
    def pipeline(self) -> TextGenerationPipeline:
        """The pipeline; `RefusedError` while the model is not loaded, or when the service is stopping."""
        if self._stopping:
            raise RefusedError(503, _STOPPING)
        if self.loaded is None:
            raise RefusedError(503, self._progress)
        return self.loaded

    def check_alive(self) -> None:
        """Raise `RefusedError` when only a new process can help: the engine is broken, or does not answer."""
        if self.loaded is not None and self.loaded.engine.status in {"broken", "stalled"}:
            raise RefusedError(500, self.loaded.engine.status_detail)

    def check_healthy(self) -> None:
        """Raise `RefusedError` when the model is not loaded or the engine is broken."""
        if self.loaded is None:
            raise RefusedError(500, self._progress)
        self.check_alive()

    def check_ready(self) -> None:
        """Raise `RefusedError` when requests would be refused."""
        engine = self.pipeline.engine
        if engine.status != "ready":
            raise RefusedError(503, engine.status_detail)

    # -- requests

    def prepare(self, generate_kwargs: Mapping[str, Any], *, fill: bool = False, **arguments: Any) -> PreparedPrompt:
        """Check a request against its own rules and the service's limits, and make its prompt's tokens.

        With `fill`, an answer takes at most the room that there is, and all of it without a limit of its own. What is
        beyond a limit is an `InvalidRequestError`; further errors are those of `TextGenerationPipeline.prepare`.
        """
        pipeline = self.pipeline
        limited = any(generate_kwargs.get(name) is not None for name in ("max_new_tokens", "max_length"))
        kwargs = generate_kwargs if limited or not fill else {**generate_kwargs, "max_new_tokens": 1}
        prepared = pipeline.prepare(generate_kwargs=kwargs, **arguments)
        length = len(prepared.prompt_ids)
        if fill:
            config = prepared.config
            room = pipeline.engine.room(length, max(config.num_beams, config.num_return_sequences))
            if room < 1:
                raise InvalidRequestError(
                    f"The prompt has {length} tokens, which leaves no room for so many answers; shorten it."
                )
            most = config.total_length(length) - length if limited else self.settings.max_new_tokens
            prepared = prepared.with_config(max_new_tokens=min(room, most or room))
        config, settings = prepared.config, self.settings
        sequences = config.num_beams * config.num_return_sequences
        if sequences > settings.max_sequences:
            raise InvalidRequestError(
                f"`n` or `num_return_sequences`, times `num_beams`, is {sequences}; this service takes at most"
                f" {settings.max_sequences} (--max-sequences)."
            )
        new_tokens = config.total_length(length) - length
        if settings.max_new_tokens and new_tokens > settings.max_new_tokens:
            raise InvalidRequestError(
                f"The request allows up to {new_tokens} new tokens; this service generates at most"
                f" {settings.max_new_tokens} (--max-new-tokens). Lower `max_tokens`, `max_new_tokens` or `max_length`."
            )
        return prepared

    def is_foreign(self, messages: object) -> bool:
        """Return whether a conversation, if there is one, is rendered by a chat template that runs apart."""
        return bool(messages) and self.loaded is not None and self.loaded.foreign_template

    def place_of(self, name: str) -> int:
        """Return the place of a model or adapter in the pipeline's `names`; `RefusedError` without such a one."""
        names = self.pipeline.names
        if name not in names:
            raise RefusedError(404, f"There is no model {name[:60]!r} here; there is {', '.join(names)}.")
        return names.index(name)

    def note_prompt(self, exchange: Exchange, asked: object) -> None:
        """Keep a request's prompt, or its conversation as JSON, for the log when prompts are logged."""
        if self.settings.log_prompts:
            exchange.prompt = asked if isinstance(asked, str) else msgspec.json.encode(asked).decode()

    def check_tokens(self, tokens: Sequence[int], field: str) -> None:
        """Raise `InvalidRequestError` when there is no such token as one in a field of a request."""
        size = self.pipeline.model.vocab_size
        for index, token in enumerate(tokens):
            if not 0 <= token < size:
                raise InvalidRequestError(
                    f"`{field}[{index}]` must be a token id from 0 to {size - 1}, but is {token}."
                )

    async def generate(self, prepared: PreparedPrompt, request_id: str) -> GenerationOutput:
        """Run a prepared request to its end, within the service's time limit."""
        return await self.pipeline.generate(prepared, timeout=self._timeout, request_id=request_id)

    def stream(
        self, prepared: PreparedPrompt, request_id: str, **options: Any
    ) -> AbstractAsyncContextManager[AsyncGenerator[Sequence[TextDelta | GenerationOutput], None]]:
        """Run a prepared request, giving its text as it comes; leaving the context ends the request.

        `options` are those of `TextGenerationPipeline.stream`.
        """
        stream = self.pipeline.stream(prepared, timeout=self._timeout, request_id=request_id, **options)
        return contextlib.aclosing(stream)
