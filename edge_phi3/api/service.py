"""What the handlers share: the pipeline once it is loaded, the limits, and how well the service is."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import structlog

from edge_phi3.api.auth import KeyRing
from edge_phi3.api.errors import InvalidRequestError, NotReadyError, UnhealthyError
from edge_phi3.api.metrics import ServiceMetrics
from edge_phi3.api.schemas import ChatRequest
from edge_phi3.engine.stats import EngineStats
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.pipeline import GenerationOutput, PreparedPrompt, TextDelta, TextGenerationPipeline
from edge_phi3.settings import Settings

logger = structlog.get_logger(__name__)

Say = Callable[[str], None]
"""Takes a sentence about how far the loading is; raises `LoadCancelledError` when the service is stopping."""

Loader = Callable[[Say], TextGenerationPipeline]
"""Makes the pipeline, however long that takes: downloads, converts, quantises, loads."""


class LoadCancelledError(EdgePhi3Error):
    """The service is stopping, so the model is not loaded to the end."""


class Service:
    """The state of one application.

    Args:
        settings: the options.
        load: makes the pipeline; called once, in a thread of its own, by `start`.

    Attributes:
        failure: what ended the loading, if anything did.
    """

    def __init__(self, settings: Settings, load: Loader) -> None:
        self.settings = settings
        self.keys = KeyRing(settings.api_keys())
        self.metrics = ServiceMetrics(settings.metrics_prefix, self._engine_stats)
        self.failure: BaseException | None = None
        self._load = load
        self._loading = threading.Thread(target=self._run_load, name="load", daemon=True)
        self._progress = "The model is loading."
        self._pipeline: TextGenerationPipeline | None = None
        self._stopping = False

    # -- life

    def start(self) -> None:
        """Begin to load the model, and return at once."""
        self._loading.start()

    def _run_load(self) -> None:
        try:
            pipeline = self._load(self._say)
            self.metrics.model_loaded(pipeline.model)
            # What there is now stays: the garbage collector would look over all of it now and then, for 20 ms during
            # which nobody else has the interpreter.
            gc.collect()
            gc.freeze()
            self._pipeline = pipeline
        except LoadCancelledError:
            return
        except BaseException as error:  # noqa: BLE001 - the server ends with it, in its own thread
            self.failure = error

    def _say(self, progress: str) -> None:
        if self._stopping:
            raise LoadCancelledError("The service is stopping.")
        self._progress = progress

    async def drain(self) -> None:
        """Take no more requests, let the running ones finish within the grace period, and end the rest."""
        self._stopping = True
        if self._pipeline is not None:
            await self._pipeline.engine.drain(self.settings.grace_period)

    def close(self, patience: float = 2.0) -> bool:
        """Stop at once. Return whether everything has stopped: a step of the loading or the engine may still go on.

        Args:
            patience: seconds to wait for each of the loading and the engine.
        """
        self._stopping = True
        if self._loading.is_alive():
            self._loading.join(patience)
        stopped = self._pipeline is None or self._pipeline.engine.close(patience)
        return stopped and not self._loading.is_alive()

    # -- how well it is

    @property
    def is_ready(self) -> bool:
        """Whether requests for text are taken."""
        return not self._stopping and self._pipeline is not None and self._pipeline.engine.status == "ready"

    @property
    def pipeline(self) -> TextGenerationPipeline:
        """The pipeline.

        Raises:
            NotReadyError: the model is not loaded, or the service is stopping.
        """
        if self._stopping:
            raise NotReadyError("The service is stopping.")
        if self._pipeline is None:
            raise NotReadyError(self._progress)
        return self._pipeline

    @property
    def loaded(self) -> TextGenerationPipeline | None:
        """The pipeline, or None while it loads."""
        return self._pipeline

    def check_alive(self) -> None:
        """Raise `UnhealthyError` when only a new process can help: the engine is broken, or does not answer."""
        if self._pipeline is not None and self._pipeline.engine.status in {"broken", "stalled"}:
            raise UnhealthyError(self._pipeline.engine.status_detail)

    def check_healthy(self) -> None:
        """Raise `UnhealthyError` when the model is not loaded or the engine is broken."""
        if self._pipeline is None:
            raise UnhealthyError(self._progress)
        self.check_alive()

    def check_ready(self) -> None:
        """Raise `NotReadyError` when requests would be refused."""
        engine = self.pipeline.engine
        if engine.status != "ready":
            raise NotReadyError(engine.status_detail)

    def _engine_stats(self) -> EngineStats | None:
        return None if self._pipeline is None else self._pipeline.engine.stats()

    # -- requests

    def prepare(self, request: ChatRequest) -> PreparedPrompt:
        """Check a request against its own rules and the service's limits, and make its prompt's tokens.

        Raises:
            NotReadyError: there is no model yet.
            PromptError: the prompt cannot be used.
            ParameterError: a parameter is wrong.
            InvalidRequestError: the request is beyond a limit.
        """
        prepared = self.pipeline.prepare(
            prompt=request.prompt,
            messages=None
            if request.messages is None
            else [{"role": message.role, "content": message.content} for message in request.messages],
            generate_kwargs=request.generate_kwargs or {},
            prefix=request.prefix,
            return_full_text=request.return_full_text is not False,
            clean_up_tokenization_spaces=bool(request.clean_up_tokenization_spaces),
            handle_long_generation=request.handle_long_generation,
        )
        self.check_limits(prepared)
        return prepared

    def prepare_within(
        self, arguments: Callable[[int], Mapping[str, Any]], max_new_tokens: int | None
    ) -> PreparedPrompt:
        """Prepare a request that may leave open how long its answer is: then it takes what there is room for.

        Args:
            arguments: gives the arguments of `TextGenerationPipeline.prepare` for a number of new tokens.
            max_new_tokens: that number, or None.

        Raises:
            InvalidRequestError: there is no room for an answer, or the request is beyond a limit.
        """
        pipeline = self.pipeline
        prepared = pipeline.prepare(**arguments(max_new_tokens or 1))
        if max_new_tokens is None:
            length = len(prepared.prompt_ids)
            rows = prepared.config.num_return_sequences
            room = pipeline.engine.room(length, rows)
            if room < 1:
                raise InvalidRequestError(
                    f"The prompt has {length} tokens, which leaves no room for an answer; shorten it."
                )
            room = min(room, self.settings.max_new_tokens or room)
            prepared = dataclasses.replace(prepared, config=dataclasses.replace(prepared.config, max_new_tokens=room))
        self.check_limits(prepared)
        return prepared

    def text_of(self, tokens: list[int], field: str, *, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids that come in a field of a request.

        Raises:
            InvalidRequestError: there is no such token.
        """
        size = self.pipeline.model.vocab_size
        for index, token in enumerate(tokens):
            if not 0 <= token < size:
                raise InvalidRequestError(
                    f"`{field}[{index}]` must be a token id from 0 to {size - 1}, but is {token}."
                )
        return self.pipeline.detokenize(tokens, skip_special_tokens=skip_special_tokens)

    def with_tokens(self, prepared: PreparedPrompt, tokens: list[int]) -> PreparedPrompt:
        """Return a prepared request these prompt tokens, instead of those that their text is encoded to."""
        exact = self.pipeline.with_tokens(prepared, tokens)
        self.check_limits(exact)
        return exact

    def check_limits(self, prepared: PreparedPrompt) -> None:
        """Raise `InvalidRequestError` for a request that exceeds the service's limits."""
        config, settings = prepared.config, self.settings
        sequences = config.num_beams * config.num_return_sequences
        if sequences > settings.max_sequences:
            raise InvalidRequestError(
                f"`num_beams` x `num_return_sequences` is {sequences}; this service takes at most"
                f" {settings.max_sequences} (--max-sequences)."
            )
        prompt_tokens = len(prepared.prompt_ids)
        new_tokens = config.total_length(prompt_tokens) - prompt_tokens
        if settings.max_new_tokens and new_tokens > settings.max_new_tokens:
            raise InvalidRequestError(
                f"The request allows up to {new_tokens} new tokens; this service generates at most"
                f" {settings.max_new_tokens} (--max-new-tokens). Lower `max_new_tokens` or `max_length`."
            )

    async def generate(self, prepared: PreparedPrompt, request_id: str) -> GenerationOutput:
        """Run a prepared request to its end, within the service's time limit."""
        timeout = self.settings.request_timeout or None
        return await self.pipeline.generate(prepared, timeout=timeout, request_id=request_id)

    def stream(
        self, prepared: PreparedPrompt, request_id: str
    ) -> AbstractAsyncContextManager[AsyncGenerator[Sequence[TextDelta | GenerationOutput], None]]:
        """Run a prepared request, giving its text as it comes; leaving the context ends the request."""
        timeout = self.settings.request_timeout or None
        return contextlib.aclosing(self.pipeline.stream(prepared, timeout=timeout, request_id=request_id))
