"""Bodies built to be slow, large or confusing: where they are prepared, what they reach, what the answers hold."""

import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pynvml
import pytest
import structlog
from structlog.testing import capture_logs

from edge_phi3.api import body as body_module
from edge_phi3.api.lanes import LONG, LONGEST
from edge_phi3.llama.model import Model
from edge_phi3.pipeline import TextGenerationPipeline
from edge_phi3.pipeline.chat_template import ChatTemplate
from tests.api.conftest import CHAT, COMPLETIONS, PATIENCE, USER, Running, loader, running

MIB = 1 << 20
MANY = {f"unknown_{number}": number for number in range(150_000)}
TWICE = b'{"prompt": "Hello", "generate_kwargs": {' + b'"top_k": 1, ' * (MIB // 4) + b'"top_k": 1}}'
SMALL = {"max_tokens": 1, "temperature": 0}
BODIES: dict[str, tuple[str, Any, int, str]] = {
    "unknown parameters": ("/chat", {"prompt": "Hello", "generate_kwargs": MANY}, 400, "is not a generation parameter"),
    "unknown fields": (COMPLETIONS, {"prompt": "Hello", **MANY, **SMALL}, 200, "unknown_0, unknown_1"),
    "a long parameter": (
        "/chat", {"prompt": "Hello", "generate_kwargs": {"x" * 3 * MIB: 1}}, 400, "x...` is not a generation parameter",
    ),
    "a long field": (COMPLETIONS, {"prompt": "Hello", "y" * 3 * MIB: 1, **SMALL}, 200, "yyy"),
    "a long message's field": (CHAT, {"messages": [{**USER[0], "z" * MIB: 1}], **SMALL}, 200, "messages[].z"),
    "a long value": ("/chat", {"prompt": "Hello", "generate_kwargs": {"top_k": "1" * MIB}}, 400, "`top_k` must be"),
    "a long list": ("/chat", {"prompt": "Hello", "generate_kwargs": {"top_k": [1] * MIB}}, 400, "`top_k` must be"),
    "a large token": ("/chat", {"prompt": "a", "generate_kwargs": {"pad_token_id": 10**4000}}, 400, "`pad_token_id`"),
    "a long role": ("/chat", {"messages": [{"role": "r" * MIB, "content": "a"}]}, 400, "role must be one of"),
    "a long choice": ("/chat", {"prompt": "a", "handle_long_generation": "h" * MIB}, 400, "handle_long_generation"),
    "a long schema": (
        CHAT, {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {
            "name": "n", "schema": {"s" * MIB: 1}}}}, 400, "response_format",
    ),
    "many prompts": (COMPLETIONS, {"prompt": ["a"] * 20_000, **SMALL}, 400, "at most 256 at once (--max-queue)"),
    "many phrases": (
        "/chat", {"prompt": "a", "generate_kwargs": {"bad_words_ids": [[1, 2]] * 2000}}, 400, "at most 1024 phrases",
    ),
    "many banned words": (CHAT, {"messages": USER, "bad_words": ["a"] * 9999}, 400, "must hold at most 1024 texts"),
    "many biased texts": (CHAT, {"messages": USER, "logit_bias": [["a", 1]] * 9999}, 400, "at most 1024 texts"),
    "many pieces": ("/tokenize", {"text": "🦙" * (MIB // 4), "with_pieces": True}, 400, "show up to 131072"),
    "a long stop": (COMPLETIONS, {"prompt": "a", "stop": "s" * MIB}, 400, "none of them empty or longer than 4096"),
    "many digits": (CHAT, {"messages": USER, "logit_bias": {"1" * 5000: 1}}, 400, "its keys are token ids"),
    "more digits than a token": (CHAT, {"messages": USER, "logit_bias": {"1" * 25: 1}}, 400, "its keys are token ids"),
    "duplicate keys": ("/chat", TWICE, 200, "Result"),
    "many tokens": ("/chat", {"prompt": "🦙" * (MIB // 4)}, 400, "maximum context length is"),
}  # fmt: skip
LLAMAS = "🦙" * (LONGEST // 4)


@pytest.mark.parametrize("name", BODIES)
def test_what_grows_with_a_body_is_done_beside_the_event_loop_and_comes_back_short(
    api: Running, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, body, status, found = BODIES[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    threads: list[str] = []
    decode = body_module._decode

    def watched(text: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return decode(text)

    monkeypatch.setattr(body_module, "_decode", watched)
    response = api.client.post(path, content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text[:500]
    assert found in f"{response.text} {response.headers.get('x-ignored-fields')}"
    assert len(response.content) + len(str(response.headers)) < 3000
    lane = "longest bodies" if len(data) >= LONGEST else "long bodies"
    assert threads[0].startswith(lane) is (len(data) >= LONG)


@pytest.mark.parametrize("path", ["/chat", CHAT, COMPLETIONS])
def test_a_text_that_its_length_disqualifies_is_not_tokenised(
    api: Running, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    seen: list[int] = []
    encode = Model.encode

    def watched(model: Model, texts: Sequence[str]) -> Any:
        seen.append(sum(map(len, texts)))
        return encode(model, texts)

    monkeypatch.setattr(Model, "encode", watched)
    room = api.service.pipeline.engine.max_length
    most = room * api.service.pipeline.engine.model.tokenizer._longest
    for text in ("🦙" * most, "word " * most, "\n" * most, " " * most, "<|end|>a" * most):
        given = {"prompt": text} if path != CHAT else {"messages": [{"role": "user", "content": f"x{text}"}]}
        response = api.client.post(path, json=given)
        assert response.status_code == 400
        assert f"maximum context length is {room} tokens" in response.text
    assert sum(seen) <= most
    # White space that a token swallows does not count.
    swallowed = "Hello<|end|>" + " " * most + "Hi"
    response = api.client.post("/chat", json={"prompt": swallowed, "return_full_text": False})
    assert response.status_code == 200


class _Gate:
    """Holds back what is encoded in the lane of the largest bodies, and counts all that is."""

    def __init__(self, encode: Callable[..., Any]) -> None:
        self.open, self.encoded, self._encode = threading.Event(), list[int](), encode

    def __call__(self, model: Model, texts: list[str]) -> Any:
        self.encoded.append(sum(map(len, texts)))
        if self.encoded[-1] > LONGEST // 8:
            assert self.open.wait(PATIENCE)
        return self._encode(model, texts)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gate]:
    gate = _Gate(Model.encode)
    monkeypatch.setattr(Model, "encode", lambda self, texts: gate(self, texts))  # noqa: PLW0108 - a method
    yield gate
    gate.open.set()


def test_the_largest_bodies_keep_nobody_waiting_and_are_forgotten_with_their_clients(api: Running, gate: _Gate) -> None:
    data = json.dumps({"text": LLAMAS}).encode()
    lanes = api.service.lanes
    for _ in range(4):
        with pytest.raises(httpx.ReadTimeout):
            api.client.post("/tokenize", content=data, timeout=0.5, headers={"Content-Type": "application/json"})
    answer = api.client.post("/tokenize", json={"text": "a " * (LONG // 2)})
    assert answer.status_code == 200
    api.wait_until(lambda: len(lanes._running) == 1)
    gate.open.set()
    api.wait_until(lambda: not lanes._running)
    assert gate.encoded.count(len(LLAMAS) + 1) == 1


def test_closing_waits_for_what_is_prepared_and_begins_nothing_more(model_path: Any, gate: _Gate) -> None:
    with running(loader(model_path)) as api:
        api.wait_until(lambda: api.service.is_ready)
        threads = [
            threading.Thread(target=lambda: api.client.post("/tokenize", json={"text": LLAMAS})) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        api.wait_until(lambda: len(api.service.lanes._running) == 3)
        assert api.service.lanes.close(0.01) is False
        gate.open.set()
        assert api.service.lanes.close(PATIENCE) is True
        for thread in threads:
            thread.join()
        assert gate.encoded.count(len(LLAMAS) + 1) == 1
        assert api.client.post("/tokenize", json={"text": LLAMAS}).status_code == 503


@pytest.mark.parametrize("path", ["/chat", CHAT])
def test_an_error_that_nobody_foresaw_is_in_the_log_under_its_requests_id(
    api: Running, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    stream = TextGenerationPipeline.stream

    async def broken(*arguments: Any, **options: Any) -> Any:
        async for items in stream(*arguments, **options):
            yield items
            raise RuntimeError("unforeseen")

    structlog.reset_defaults()
    body = {"messages": USER, "stream": True}
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(TextGenerationPipeline, "stream", broken)
        streamed = api.client.post(path, json=body, headers={"X-Request-Id": "in-stream"})
        patch.setattr(TextGenerationPipeline, "prepare", functools.partial(dict.pop, {}))
        whole = api.client.post(path, json=body, headers={"X-Request-Id": "before"})
    assert "its log has more" in streamed.text
    assert (whole.status_code, "its log has more" in whole.text) == (500, True)
    told = [(entry["request_id"], type(entry["exc_info"])) for entry in logs if entry["event"] == "unhandled error"]
    assert told == [("in-stream", RuntimeError), ("before", TypeError)]


def test_headers_of_one_origin_never_reach_another(model_path: Any) -> None:
    origins = ["https://a.example", "https://b.example"]
    requests = [
        ("/chat", {"messages": USER, "stream": True, "generate_kwargs": {"max_new_tokens": 1}}),
        ("/chat", {"prompt": 1}),
        ("/nowhere", {}),
        (CHAT, {"messages": USER, "max_tokens": 1}),
    ]
    with running(loader(model_path), cors_origin=origins, api_key=["right"], rate_limit="20/day") as api:
        api.wait_until(lambda: api.service.is_ready)
        for (path, body), origin, key in itertools.product(requests * 2, [*origins, ""], ["right", "wrong"]):
            headers = {"Authorization": f"Bearer {key}"} | ({"Origin": origin} if origin else {})
            response = api.client.post(path, json=body, headers=headers)
            allowed = response.headers.get_list("access-control-allow-origin")
            assert allowed == ([origin] if origin else []), (path, response.status_code)
            assert len(response.headers.get_list("x-ratelimit-limit-requests")) <= 1


def test_a_gpu_that_shares_the_machines_memory_is_shown_with_it(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in ("DeviceGetMemoryInfo", "DeviceGetUtilizationRates", "DeviceGetTemperature"):
        monkeypatch.setattr(pynvml, f"nvml{name}", unsupported)
    for name, answer in {"Init": None, "Shutdown": None, "DeviceGetCount": 1, "DeviceGetName": "GB10"}.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda *_, answer=answer: answer)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index + 1)
    (gpu,) = api.client.get("/metrics").json()["gpu_info"]
    assert (gpu["name"], gpu["load"], gpu["temperature"]) == ("GB10", "n/a", "n/a")
    assert gpu["memory"]["total"].endswith(" GB")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", unsupported)
    assert api.client.get("/metrics").json()["cpu_info"] is not None


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (
            "{% for i in range(9**5) if messages|length == 1 %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
            "1 s of",
        ),
        ("{{ messages[0].content * 100000000 }}", "MemoryError"),
    ],
)
def test_a_template_without_end_costs_its_requests_alone(
    api: Running, monkeypatch: pytest.MonkeyPatch, source: str, what: str
) -> None:
    template = ChatTemplate(source)
    assert template.foreign
    monkeypatch.setattr(api.service.pipeline, "_template", template)
    monkeypatch.setattr(api.service.pipeline, "foreign_template", True)
    for path in ("/chat", CHAT, "/tokenize"):
        if path == "/chat" or "Memory" in what:
            response = api.client.post(path, json={"messages": USER})
            assert response.status_code == 400
            assert what in response.text
    assert api.client.get("/healthz").status_code == 200
    assert api.client.post("/tokenize", json={"text": "the"}).status_code == 200
