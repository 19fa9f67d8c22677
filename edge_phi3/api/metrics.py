"""Prometheus metrics: the names, labels and buckets that vLLM's dashboards know, under a prefix of our own."""

import itertools
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from edge_phi3.api.exchange import Exchange
from edge_phi3.engine.stats import EngineStats, Times
from edge_phi3.pipeline import ModelCard
from edge_phi3.version import __version__

Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)

_OUTCOMES = {
    200: "ok",
    401: "unauthorized",
    429: "overloaded",
    499: "disconnected",
    503: "unavailable",
    504: "timeout",
}

_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_PER_TOKEN_BUCKETS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY_BUCKETS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_GAUGES: Final[Mapping[str, tuple[str, Callable[[EngineStats], float]]]] = {
    "num_requests_running": ("Requests being decoded.", lambda stats: stats.running),
    "num_requests_waiting": ("Requests in the queue.", lambda stats: stats.waiting),
    "num_sequences_running": ("Sequences being decoded.", lambda stats: stats.sequences),
    "prefix_cache_tokens": ("Tokens of finished sequences kept in main memory.", lambda stats: stats.stored_tokens),
    "prefix_cache_bytes": ("Main memory that they take.", lambda stats: stats.stored_bytes),
    "kv_cache_cells_used": ("KV cells that hold a token.", lambda stats: stats.cells_used),
    "kv_cache_cells": ("KV cells there are.", lambda stats: stats.cells_total),
    "kv_cache_usage_perc": (
        "KV cells in use, from 0 to 1.",
        lambda stats: stats.cells_used / max(1, stats.cells_total),
    ),
}
_COUNTERS: Final[Mapping[str, tuple[str, Callable[[EngineStats], float]]]] = {
    "prompt_tokens": ("Tokens of prompts.", lambda stats: stats.totals.prompt),
    "generation_tokens": ("Tokens generated.", lambda stats: stats.totals.generated),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda stats: stats.totals.prompt),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda stats: stats.totals.cached),
    "spec_decode_num_draft_tokens": ("Tokens drafted.", lambda stats: stats.totals.drafted),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that the model chose.", lambda stats: stats.totals.accepted),
    "num_preemptions": ("Requests sent back to the queue for want of KV cells.", lambda stats: stats.preemptions_total),
    "engine_steps": ("Batches decoded.", lambda stats: stats.steps_total),
}
_TIMES: Final[Mapping[str, tuple[str, Callable[[EngineStats], Times]]]] = {
    "engine_step_device_seconds": ("From the launch of a batch to its logits.", lambda stats: stats.device_times),
    "engine_step_host_seconds": ("What a step takes beside its batch.", lambda stats: stats.host_times),
}


class ServiceMetrics(Collector):
    """All metrics of one application, in a registry of its own; the prefix is what every name starts with.

    Requests are counted as they end; the engine's counters and gauges are read at each scrape, once there is an engine.
    """

    def __init__(self, prefix: str, stats: Callable[[], EngineStats | None]) -> None:
        self.registry = CollectorRegistry()
        self.model: ModelCard | None = None
        self._prefix = prefix
        self._stats = stats

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(prefix + name, text, ["model_name"], buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(prefix + name, text, labels, registry=self.registry)

        self._requests = counter("requests", "Requests for text, by endpoint and outcome.", "endpoint", "outcome")
        self._by_key = counter("key_requests", "Requests for text, by API key and outcome.", "key", "outcome")
        self._tokens = counter("key_tokens", "Tokens, by API key: prompts' and generated ones.", "key", "kind")
        self._success = counter(
            "request_success", "Returned sequences, by what finished them.", "model_name", "finished_reason"
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_BUCKETS
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Seconds per token after the first, a request's mean.", _PER_TOKEN_BUCKETS
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "From arrival to the end of a finished request.", _LATENCY_BUCKETS
        )
        self._queue = histogram("request_queue_time_seconds", "Time spent in the queue.", _LATENCY_BUCKETS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKEN_BUCKETS)
        self._generation = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKEN_BUCKETS)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    @property
    def model_name(self) -> str:
        """The name of the model that is served, empty before it is loaded."""
        return self.model.name if self.model else ""

    def record(self, exchange: Exchange) -> None:
        """Count a request for text that has ended; other paths are not counted."""
        if exchange.operation is None or exchange.scope["method"] != "POST":
            return
        outcome = _OUTCOMES.get(exchange.status, "invalid" if 400 <= exchange.status < 500 else "error")
        if outcome == "ok" and exchange.error is not None:
            outcome = "disconnected" if exchange.error == "ClientDisconnectedError" else "error"
        self._requests.labels(exchange.path, outcome).inc()
        output, key = exchange.output, exchange.key
        if key is not None:
            self._by_key.labels(key, outcome).inc()
        if output is None:
            return
        if key is not None:
            self._tokens.labels(key, "prompt").inc(output.prompt_tokens)
            self._tokens.labels(key, "generation").inc(output.completion_tokens)
        model, timing = self.model_name, output.timing
        for reason in output.finish_reasons:
            self._success.labels(model, reason).inc()
        self._latency.labels(model).observe(exchange.seconds)
        self._queue.labels(model).observe(timing.queue)
        self._first_token.labels(model).observe(timing.first_token)
        self._prompt.labels(model).observe(output.prompt_tokens)
        self._generation.labels(model).observe(output.completion_tokens)
        steps = output.completion_tokens / max(1, len(output.finish_reasons)) - 1
        if steps > 0:
            self._per_token.labels(model).observe((timing.total - timing.first_token) / steps)

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's state as Prometheus metrics."""
        versions = {
            "version": __version__,
            "llama_cpp": version("llama-cpp-python"),
            "python": platform.python_version(),
        }
        yield self._family(GaugeMetricFamily, "build_info", "Versions.", versions)
        stats = self._stats()
        if stats is None:
            return
        model = {"model_name": self.model_name}
        description = self.model.description if self.model else ""
        yield self._family(GaugeMetricFamily, "model_info", "The model served.", model | {"description": description})
        cells = {"block_size": "1", "num_gpu_blocks": str(stats.cells_total)}
        yield self._family(GaugeMetricFamily, "cache_config_info", "The KV cache in blocks, here single cells.", cells)
        layers = self._family(
            GaugeMetricFamily, "model_layers", "Layers, the output too, by device.", {"device": "gpu"}, stats.gpu_layers
        )
        layers.add_metric(["cpu"], stats.cpu_layers)
        yield layers
        for name, (text, value) in _GAUGES.items():
            yield self._family(GaugeMetricFamily, name, text, model, value(stats))
        for name, (text, value) in _COUNTERS.items():
            yield self._family(CounterMetricFamily, name, text, model, value(stats))
        for name, (text, times_of) in _TIMES.items():
            times, labels = times_of(stats), [str(bound) for bound in Times.BOUNDS]
            counts = itertools.accumulate(times.counts)
            histogram = HistogramMetricFamily(self._prefix + name, text, labels=list(model))
            buckets = list(zip([*labels, "+Inf"], map(float, counts), strict=True))
            histogram.add_metric(list(model.values()), buckets, times.total)
            yield histogram

    def _family(self, kind: type[Family], name: str, text: str, labels: Mapping[str, str], value: float = 1) -> Family:
        family = kind(self._prefix + name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family
