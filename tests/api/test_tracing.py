"""Traces: real spans, sent by the real exporter to a collector on this machine."""

from __future__ import annotations

import contextlib
import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from edge_phi3.api.tracing import tracing_of
from edge_phi3.settings import Settings, SettingsError
from tests.api.conftest import PATIENCE, PROMPT, loader, ready

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """What a collector has received: spans by name, and the resource that they are from."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = values(of_resource.resource.attributes)
            for scope in of_resource.scope_spans:
                self.spans += scope.spans


def values(attributes: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(each) for each in value.array_value.values]
        return getattr(value, kind)

    return {each.key: plain(each.value) for each in attributes}


@contextlib.contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.take(self.path, gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_each_request_is_a_span_that_continues_the_client_s_trace(model_path: Path) -> None:
    with collecting() as (collector, url), ready(loader(model_path), otel_endpoint=url + "/") as api:
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
    assert collector.paths == {"/v1/traces"}
    assert collector.resource["service.name"] == "edge-phi3"
    assert "service.version" in collector.resource
    assert collector.named("GET /healthz") == []
    first, refused = collector.named("POST /chat")
    assert (first.trace_id.hex(), first.parent_span_id.hex(), first.kind) == (TRACE, PARENT, 2)
    assert min(first.start_time_unix_nano, first.end_time_unix_nano) > 0
    told = values(first.attributes)
    assert told["http.request.method"] == "POST"
    assert told["http.response.status_code"] == 200
    assert told["http.request.header.x-request-id"] == ["mine"]
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.response.model"] == "random-4k"
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["gen_ai.usage.input_tokens"] > 5
    assert 0 <= told["gen_ai.latency.time_in_queue"] <= told["gen_ai.latency.time_to_first_token"]
    assert told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"]
    assert first.status.code == 0
    assert values(refused.attributes)["http.response.status_code"] == 400
    assert "gen_ai.usage.output_tokens" not in values(refused.attributes)
    assert refused.trace_id.hex() != TRACE
    (streamed,) = collector.named("POST /v1/chat/completions")
    assert values(streamed.attributes)["gen_ai.operation.name"] == "chat"
    assert values(streamed.attributes)["gen_ai.usage.output_tokens"] <= 3


def test_a_request_that_fails_is_a_failed_span(model_path: Path) -> None:
    with (
        collecting() as (collector, url),
        ready(loader(model_path), otel_endpoint=url, request_timeout=0.001) as api,
    ):
        kwargs = {"max_new_tokens": 1900, "eos_token_id": -1}
        assert api.chat(prompt=PROMPT, generate_kwargs=kwargs).status_code == 504
    (span,) = collector.named("POST /chat")
    assert span.status.code == 2
    assert values(span.attributes)["error.type"] == "504"


def test_opentelemetry_s_own_variable_is_honoured(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as (collector, url):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        with ready(loader(model_path)) as api:
            api.client.get("/version")
            api.client.get("/nothing/here")
    assert collector.paths == {"/v1/traces"}
    assert collector.resource["service.name"] == "mine"
    assert len(collector.named("GET /version")) == 1
    (unknown,) = collector.named("GET")
    assert values(unknown.attributes)["url.path"] == "/nothing/here"


def test_without_a_collector_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing_of(Settings.load({})) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing_of(Settings.load({})) is None


def test_a_collector_that_is_away_disturbs_nobody(model_path: Path) -> None:
    with ready(loader(model_path), otel_endpoint="http://127.0.0.1:9") as api:
        assert api.client.get("/version").status_code == 200


HIDDEN = """
import sys
sys.modules["opentelemetry"] = None
from edge_phi3.cli import main
sys.argv = ["edge-phi3", "serve", "--port", "0", *sys.argv[1:]]
main()
"""


def test_without_the_extra_asking_for_traces_is_one_sentence() -> None:
    command = [sys.executable, "-c", HIDDEN, "--otel-endpoint", "http://127.0.0.1:4318", "--log-level", "error"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "edge-phi3: --otel-endpoint: traces need packages that are not installed: pip install 'edge-phi3[otel]'.\n"
    )


def test_without_the_extra_opentelemetry_s_variable_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert tracing_of(Settings.load({})) is None


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(SettingsError, match="--otel-endpoint"):
        Settings.load({"otel_endpoint": "collector:4318"})
