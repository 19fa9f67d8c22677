"""What is recorded of a request: its id, a log line, and a span that the real exporter sends to a collector here."""

import functools
import gzip
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from edge_phi3.api.logs import configure_logging
from edge_phi3.api.tracing import tracing_of
from edge_phi3.pipeline import TextGenerationPipeline
from edge_phi3.settings import Settings
from tests.api.conftest import CHAT, GREEDY, PATIENCE, PROMPT, USER, Running, loader, ready
from tests.support.cases import cases, tables

pytestmark = pytest.mark.usefixtures("_logging")

SECRETS = {"prompt": "the-secret-prompt", "key": "the-secret-key"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_request_id_is_taken_and_returned_when_it_is_a_plain_word(api: Running) -> None:
    def returned(given: str) -> str:
        return api.client.get("/", headers={"x-request-id": given}).headers["x-request-id"]

    for given in ("abc-123", "a.b:c/d+e=f@g", "x" * 128):
        assert returned(given) == given
    others = ["", "two words", "x" * 129, "<script>"]
    made = {returned(given) for given in others * 2}
    assert len(made) == 2 * len(others)
    assert made.isdisjoint(others)
    assert api.client.get("/").headers["x-request-id"]


def lines(text: str) -> list[dict[str, Any]]:
    """Parse JSON log lines."""
    return [json.loads(line) for line in text.splitlines()]


def test_a_request_is_one_line_with_its_counts_and_times(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    with ready(loader(model_path), api_key=[SECRETS["key"]]) as api:
        api.client.headers["x-api-key"] = SECRETS["key"]
        body = {"prompt": SECRETS["prompt"], "generate_kwargs": {**GREEDY, "eos_token_id": -1}}
        api.client.post("/chat", json=body, headers={"x-request-id": "mine"})
        api.chat(prompt=SECRETS["prompt"], generate_kwargs={"top_p": 9})
        api.client.get("/healthz")
    errors = capsys.readouterr().err
    line, refused = (line for line in lines(errors) if line["event"] == "POST /chat")
    expected = {"request_id": "mine", "status": 200, "completion_tokens": 8, "finish": "length"}
    assert line | expected == line
    assert line["prompt_tokens"] > 0
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["ms"]
    assert line["tokens_per_second"] > 0
    assert refused["status"] == 400
    for unsaid in ("healthz", *SECRETS.values()):
        assert unsaid not in errors


@cases
def test_prompts_and_answers_are_logged_only_when_asked_for(
    model_path: Path, capsys: pytest.CaptureFixture[str], path: str, body: dict[str, Any], prompt: Any
) -> None:
    configure_logging("json", "info")
    with ready(loader(model_path), log_prompts=True) as api:
        answer = api.client.post(path, json=body | {"generate_kwargs": GREEDY}).json()
    (line,) = (line for line in lines(capsys.readouterr().err) if line["event"] == f"POST {path}")
    assert (line["prompt"] if isinstance(prompt, str) else json.loads(line["prompt"])) == prompt
    choice = answer.get("choices", [{"text": answer.get("Result")}])[0]
    assert line["answer"] == choice.get("text", choice.get("message", {}).get("content"))


@pytest.mark.parametrize("path", ["/chat", CHAT])
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_an_error_that_nobody_foresaw_is_logged_under_its_request_s_id_and_not_told(
    api: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log_format: Any, path: str
) -> None:
    stream = TextGenerationPipeline.stream

    async def broken(*arguments: Any, **options: Any) -> Any:
        async for items in stream(*arguments, **options):
            yield items
            raise RuntimeError("inner workings")

    configure_logging(log_format, "warning")
    logging.getLogger("edge_phi3.engine").warning("The window moved.")
    logging.getLogger("edge_phi3.engine").info("not shown")
    body = {"messages": [{"role": "user", "content": SECRETS["prompt"]}], "stream": True}
    monkeypatch.setattr(TextGenerationPipeline, "stream", broken)
    streamed = api.client.post(path, json=body, headers={"X-Request-Id": "in-stream"})
    monkeypatch.setattr(TextGenerationPipeline, "prepare", functools.partial(dict.pop, {}))
    whole = api.client.post(path, json=body, headers={"X-Request-Id": "before"})
    assert (streamed.status_code, whole.status_code) == (200, 500)
    for answer in (streamed.text, whole.text):
        assert "X-Request-Id" in answer
        assert "its log has more" in answer
        assert "inner workings" not in answer
    written = capsys.readouterr().err
    for said in ("The window moved.", "warning", "RuntimeError: inner workings"):
        assert said in written
    for unsaid in ("not shown", SECRETS["prompt"]):
        assert unsaid not in written
    if log_format == "json":
        errors = [line for line in lines(written) if line["level"] == "error"]
        told = [(line["request_id"], re.findall("RuntimeError:|TypeError:", line["exception"])) for line in errors]
        assert told == [("in-stream", ["RuntimeError:"]), ("before", ["TypeError:"])]
        assert all("Traceback" in line["exception"] for line in errors)


class Collector(HTTPServer):
    """Receives traces; keeps their spans in order, and the resource that they are from."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resource = values(of_resource.resource.attributes)
            self.server.spans += [span for scope in of_resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


def values(attributes: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {each.key: plain(each.value) for each in attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that no variable of OpenTelemetry names."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_each_request_is_a_span_that_continues_the_client_s_trace(model_path: Path, collector: Collector) -> None:
    with ready(loader(model_path), otel_endpoint=collector.url + "/") as api:
        kwargs = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": -1}
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
        answer = api.client.post("/chat", json={"prompt": PROMPT, "generate_kwargs": kwargs}, headers=headers)
        assert answer.status_code == 200
        body = {"messages": USER, "max_tokens": 3, "stream": True}
        assert "[DONE]" in api.client.post("/v1/chat/completions", json=body).text
        assert api.chat(prompt="").status_code == 400
        assert api.client.get("/healthz").status_code == 200
        # The service is stopped, and has sent all that there was.
    assert collector.resource["service.name"] == "edge-phi3"
    assert "service.version" in collector.resource
    assert collector.named("GET /healthz") == []
    first, refused = collector.named("POST /chat")
    assert (first.trace_id.hex(), first.parent_span_id.hex(), first.kind) == (TRACE, PARENT, 2)
    assert 0 < first.start_time_unix_nano < first.end_time_unix_nano
    told = values(first.attributes)
    assert told | tables(__file__)["SPAN"] == told
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


def test_opentelemetry_s_own_variables_are_honoured_and_failures_are_failed_spans(
    model_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracing_of(Settings.load({})) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with ready(loader(model_path), request_timeout=0.001) as api:
        api.client.get("/version")
        api.client.get("/nothing/here")
        kwargs = {"max_new_tokens": 1900, "eos_token_id": -1}
        assert api.chat(prompt=PROMPT, generate_kwargs=kwargs).status_code == 504
    assert collector.resource["service.name"] == "mine"
    assert len(collector.named("GET /version")) == 1
    (unknown,) = collector.named("GET")
    assert values(unknown.attributes)["url.path"] == "/nothing/here"
    (failed,) = collector.named("POST /chat")
    assert (failed.status.code, values(failed.attributes)["error.type"]) == (2, "504")
    with monkeypatch.context() as patch:
        patch.setenv("OTEL_SDK_DISABLED", "true")
        assert tracing_of(Settings.load({})) is None
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert tracing_of(Settings.load({})) is None, "without the extra a variable, which clusters set for all, is none"


def test_the_option_needs_the_extra_and_a_collector_that_is_away_disturbs_nobody(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # seconds in which the last spans are tried to be sent
    with ready(loader(model_path), otel_endpoint="http://127.0.0.1:9") as api:
        assert api.client.get("/version").status_code == 200
    hidden = 'import sys; sys.modules["opentelemetry"] = None; from edge_phi3.cli import main; main()'
    options = ["--port", "0", "--otel-endpoint", "http://127.0.0.1:4318", "--log-level", "error"]
    command = [sys.executable, "-c", hidden, "serve", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    sentence = "--otel-endpoint: traces need packages that are not installed: pip install 'edge-phi3[otel]'."
    assert (result.returncode, result.stderr) == (1, f"edge-phi3: {sentence}\n")
