"""Traces: real spans, sent by the real exporter to a collector on this machine."""

from __future__ import annotations

import contextlib
import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from edge_phi3.api.tracing import tracing_of
from edge_phi3.settings import Settings, SettingsError
from tests.api.conftest import PATIENCE, PROMPT, loader, ready

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Collector:
    """What a collector has received: spans in order, and the resource that they are from."""

    url: str = ""
    spans: list[Any] = field(default_factory=list)
    resource: dict[str, Any] = field(default_factory=dict)

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


def values(attributes: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {each.key: plain(each.value) for each in attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                collector.resource = values(of_resource.resource.attributes)
                collector.spans += [span for scope in of_resource.scope_spans for span in scope.spans]
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            yield collector


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_each_request_is_a_span_that_continues_the_client_s_trace(model_path: Path, collector: Collector) -> None:
    with ready(loader(model_path), otel_endpoint=collector.url + "/") as api:
        kwargs = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": -1}
        answer = api.client.post(
            "/chat",
            json={"prompt": PROMPT, "generate_kwargs": kwargs},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"},
        )
        assert answer.status_code == 200
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
        assert "[DONE]" in api.client.post("/v1/chat/completions", json=body).text
        assert api.client.post("/chat", json={"prompt": ""}).status_code == 400
        assert api.client.get("/healthz").status_code == 200
        # The service is stopped, and has sent all that there was.
    assert collector.resource["service.name"] == "edge-phi3"
    assert "service.version" in collector.resource
    assert collector.named("GET /healthz") == []
    first, refused = collector.named("POST /chat")
    assert (first.trace_id.hex(), first.parent_span_id.hex(), first.kind) == (TRACE, PARENT, 2)
    assert 0 < first.start_time_unix_nano < first.end_time_unix_nano
    told = values(first.attributes)
    expected = {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/chat",
        "http.request.header.x-request-id": ["mine"],
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "edge-phi3",
        "gen_ai.response.model": "random-4k",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.output_tokens": 5,
    }
    assert told | expected == told
    assert told["gen_ai.usage.input_tokens"] > 5
    times = [told[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e")]
    assert [0, *times] == sorted([0, *times])
    assert first.status.code == 0
    assert values(refused.attributes)["http.response.status_code"] == 400
    assert {"gen_ai.usage.output_tokens", "error.type"}.isdisjoint(values(refused.attributes))
    assert refused.trace_id.hex() != TRACE
    (streamed,) = collector.named("POST /v1/chat/completions")
    assert values(streamed.attributes)["gen_ai.operation.name"] == "chat"
    assert values(streamed.attributes)["gen_ai.usage.output_tokens"] <= 3


def test_a_request_that_fails_is_a_failed_span(model_path: Path, collector: Collector) -> None:
    with ready(loader(model_path), otel_endpoint=collector.url, request_timeout=0.001) as api:
        kwargs = {"max_new_tokens": 1900, "eos_token_id": -1}
        assert api.chat(prompt=PROMPT, generate_kwargs=kwargs).status_code == 504
    (span,) = collector.named("POST /chat")
    assert span.status.code == 2
    assert values(span.attributes)["error.type"] == "504"


def test_opentelemetry_s_own_variables_are_honoured(
    model_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracing_of(Settings.load({})) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with ready(loader(model_path)) as api:
        api.client.get("/version")
        api.client.get("/nothing/here")
    assert collector.resource["service.name"] == "mine"
    assert len(collector.named("GET /version")) == 1
    (unknown,) = collector.named("GET")
    assert values(unknown.attributes)["url.path"] == "/nothing/here"
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing_of(Settings.load({})) is None


def test_a_collector_that_is_away_disturbs_nobody(model_path: Path) -> None:
    with ready(loader(model_path), otel_endpoint="http://127.0.0.1:9") as api:
        assert api.client.get("/version").status_code == 200


def test_without_the_extra_the_option_is_one_sentence_and_the_variable_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = 'import sys; sys.modules["opentelemetry"] = None; from edge_phi3.cli import main; main()'
    command = [sys.executable, "-c", hidden, "serve", "--port", "0", "--otel-endpoint", "http://127.0.0.1:4318"]
    result = subprocess.run(
        [*command, "--log-level", "error"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (result.returncode, result.stderr) == (
        1,
        "edge-phi3: --otel-endpoint: traces need packages that are not installed: pip install 'edge-phi3[otel]'.\n",
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert tracing_of(Settings.load({})) is None


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(SettingsError, match="--otel-endpoint"):
        Settings.load({"otel_endpoint": "collector:4318"})
