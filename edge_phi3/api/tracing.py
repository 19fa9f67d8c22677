"""OpenTelemetry traces: one span for each request, sent to a collector over OTLP/HTTP.

A span is made when its request has ended, from what the log line is made from, so that requests cost nothing more while
they run. The packages are those of the extra ``otel`` and are imported only where traces are sent.
"""

import os
import time
from typing import Any, Final

import structlog

from edge_phi3.api.exchange import Exchange
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.settings import Settings
from edge_phi3.version import __version__

logger = structlog.get_logger(__name__)

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PATIENCE: Final = 3.0
"""Seconds that sending a batch may take where OTEL_EXPORTER_OTLP_TIMEOUT does not say: a stop waits for it."""


class TracingError(EdgePhi3Error):
    """Traces are configured, and the packages that send them are not installed."""


class Tracing:
    """Sends a span for each request to a collector.

    ``/v1/traces`` is added to `endpoint`, the collector's URL; None takes that of the environment.
    """

    def __init__(self, endpoint: str | None) -> None:
        try:
            from opentelemetry import trace  # noqa: PLC0415 - an extra
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        except ImportError:
            raise TracingError(
                "--otel-endpoint: traces need packages that are not installed: pip install 'edge-phi3[otel]'."
            ) from None
        name = os.environ.get("OTEL_SERVICE_NAME", "edge-phi3")
        patience = None if "OTEL_EXPORTER_OTLP_TIMEOUT" in os.environ else _PATIENCE
        url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
        self._provider = TracerProvider(
            resource=Resource.create({"service.version": __version__, "service.name": name}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=patience)))
        self._tracer = self._provider.get_tracer("edge_phi3", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._server = trace.SpanKind.SERVER
        self._failed = trace.Status(trace.StatusCode.ERROR)

    def record(self, exchange: Exchange, model: str) -> None:
        """Make the span of a request that has ended; it continues the trace of the client's ``traceparent``."""
        if exchange.is_probe:
            return
        end = time.time_ns()
        method, headers = exchange.scope["method"], exchange.scope["headers"]
        span = self._tracer.start_span(
            # Paths that do not exist are anybody's invention; names of spans must be few.
            method if exchange.status == 404 else f"{method} {exchange.path}",
            context=self._propagator.extract(
                {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
            ),
            kind=self._server,
            attributes=_attributes(exchange, model),
            start_time=end - int(exchange.seconds * 1e9),
        )
        if exchange.status >= 500 or exchange.error is not None:
            span.set_status(self._failed)
        span.end(end)

    def close(self) -> None:
        """Send what is still to be sent."""
        self._provider.shutdown()


def tracing_of(settings: Settings) -> Tracing | None:
    """Return what sends traces where the options or OpenTelemetry's own variables name a collector, else None."""
    if settings.otel_endpoint is not None:
        return Tracing(settings.otel_endpoint)
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, _ENDPOINTS)):
        return None
    try:
        return Tracing(None)
    except TracingError:
        # Clusters set the variables for everybody.
        logger.warning("no traces: pip install 'edge-phi3[otel]'", variable=" or ".join(_ENDPOINTS))
        return None


def _attributes(exchange: Exchange, model: str) -> dict[str, Any]:
    """Describe a request by OpenTelemetry's conventions for HTTP servers and generative AI.

    The conventions have no attribute of a span for times yet: those are vLLM's.
    """
    scope, output = exchange.scope, exchange.output
    known: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.response.status_code": exchange.status,
        "url.path": exchange.path,
        "url.scheme": scope.get("scheme", "http"),
        "http.request.header.x-request-id": [exchange.request_id],
        "error.type": exchange.error or (str(exchange.status) if exchange.status >= 500 else None),
    }
    if exchange.operation is not None:
        known |= {
            "gen_ai.operation.name": exchange.operation,
            "gen_ai.provider.name": "edge-phi3",
            "gen_ai.response.model": model,
        }
    if output is not None:
        known |= {
            "gen_ai.response.finish_reasons": output.finish_reasons,
            "gen_ai.usage.input_tokens": output.prompt_tokens,
            "gen_ai.usage.output_tokens": output.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": output.cached_tokens,
            "gen_ai.latency.time_in_queue": output.timing.queue,
            "gen_ai.latency.time_to_first_token": output.timing.first_token,
            "gen_ai.latency.e2e": output.timing.total,
        }
    return {name: value for name, value in known.items() if value is not None}
