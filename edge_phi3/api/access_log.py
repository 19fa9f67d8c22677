"""Around the whole application: each request gets its id, and its end is logged, counted and traced."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from typing import Any

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from edge_phi3.api.exchange import Exchange
from edge_phi3.api.metrics import ServiceMetrics
from edge_phi3.api.tracing import Tracing
from edge_phi3.pipeline import GenerationOutput

logger = structlog.get_logger("edge_phi3.access")

QUIET_PATHS = frozenset({"/", "/healthz", "/livez", "/readyz", "/metrics", "/metrics/prometheus"})
"""What probes and scrapers ask for every few seconds: logged at the level debug."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class AccessLog:
    """The ASGI application, with an id for each request and a record of its end."""

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics, tracing: Tracing | None = None) -> None:
        self.app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope["headers"]))
        scope.setdefault("state", {})["exchange"] = exchange
        header = (b"x-request-id", exchange.request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - exchange.started
            self._metrics.record(scope["path"], exchange.status, exchange.output, exchange.error, seconds)
            self._log(scope, exchange, seconds)
            if self._tracing is not None and scope["path"] not in QUIET_PATHS:
                self._tracing.record(scope, exchange, seconds, self._metrics.model_name)

    def _log(self, scope: HTTPScope, exchange: Exchange, seconds: float) -> None:
        path = scope["path"]
        log = logger.debug if path in QUIET_PATHS else logger.info
        facts: dict[str, Any] = {"status": exchange.status, "ms": round(seconds * 1e3, 1)}
        if exchange.error is not None:
            facts["error"] = exchange.error
        if exchange.output is not None:
            facts |= _generation_facts(exchange.output)
        if exchange.prompt is not None:
            facts["prompt"] = exchange.prompt
            facts["answer"] = exchange.output.text if exchange.output else None
        log(f"{scope['method']} {path}", request_id=exchange.request_id, **facts)


def _generation_facts(output: GenerationOutput) -> dict[str, Any]:
    timing = output.timing
    decoding = timing.total - timing.first_token
    return {
        "prompt_tokens": output.prompt_tokens,
        "cached_tokens": output.cached_tokens,
        "completion_tokens": output.completion_tokens,
        "finish": ",".join(output.finish_reasons),
        "queue_ms": round(timing.queue * 1e3, 1),
        "ttft_ms": round(timing.first_token * 1e3, 1),
        "tokens_per_second": round((output.completion_tokens - 1) / decoding, 1) if decoding > 0 else None,
    }


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return uuid.uuid4().hex
