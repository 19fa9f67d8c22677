"""Bodies built to be slow, large or confusing: where they are prepared, what they reach, what the answers hold."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_phi3.api import body as body_module
from edge_phi3.api.service import LONG, LONGEST
from edge_phi3.llama.model import Model
from edge_phi3.pipeline.chat_template import ChatTemplate
from tests.api.conftest import CHAT, COMPLETIONS, GREEDY, PATIENCE, USER, Running, loader, ready
from tests.support.cases import cases

LLAMAS = "🦙" * (LONGEST // 4)
SIGNS = st.text('ab"\\,[]{}:\n🦙', max_size=6)
VALUES = st.recursive(
    SIGNS | st.sampled_from([-2.5, 10**30]), lambda inner: st.lists(inner) | st.dictionaries(SIGNS, inner)
)


@cases
def test_what_grows_with_a_body_is_done_beside_the_event_loop_and_comes_back_short(
    api: Running, monkeypatch: pytest.MonkeyPatch, *, path: str, body: dict[str, Any], status: int, found: str
) -> None:
    many = '": 1, "'.join(f"unknown_{number}" for number in range(30_000))
    text = json.dumps(body, ensure_ascii=False).replace("MANY", many).replace('"LARGE"', str(10**4000))
    data = text.replace('"TWICE": 1', ", ".join(['"top_k": 1'] * 40_000)).encode()
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
    assert {thread.startswith(lane) for thread in threads} == (set() if "backslashes" in found else {len(data) >= LONG})


def _weight(value: Any) -> int:
    held = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    commas = max(0, len(value) - 1) if isinstance(value, dict | list) else 0
    beyond = max(0, len(str(value)) - 19) if isinstance(value, int) else 0
    return body_module.COSTLY * (isinstance(value, str | dict | list) + beyond) + commas + sum(map(_weight, held))


@given(VALUES, st.booleans())
def test_values_are_counted_as_json_has_them(value: Any, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert body_module._weight(data) == _weight(value) + data.count(b"\\") // 4
    assert all(body_module._weight(broken) <= 10 for broken in (b"", b"\\", b'"\\', b'["\\\\\\'))


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


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What holds back texts in the lane of the largest bodies until it is `open`, and the lengths of all `encoded`."""
    gate, encode = SimpleNamespace(open=threading.Event(), encoded=[]), Model.encode

    def held(model: Model, texts: list[str]) -> Any:
        gate.encoded.append(sum(map(len, texts)))
        if gate.encoded[-1] > LONGEST // 8:
            assert gate.open.wait(PATIENCE)
        return encode(model, texts)

    monkeypatch.setattr(Model, "encode", held)
    yield gate
    gate.open.set()


def test_the_largest_bodies_keep_nobody_waiting_and_are_forgotten_with_their_clients(
    api: Running, gate: SimpleNamespace
) -> None:
    data = json.dumps({"text": LLAMAS}, ensure_ascii=False).encode()
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


def test_closing_waits_for_what_is_prepared_and_begins_nothing_more(model_path: Any, gate: SimpleNamespace) -> None:
    with ready(loader(model_path)) as api:
        threads = [
            threading.Thread(target=lambda: api.client.post("/tokenize", json={"text": LLAMAS})) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        api.wait_until(lambda: gate.encoded and len(api.service.lanes._running) == 3)
        assert api.service.lanes.close(0.01) is False
        gate.open.set()
        assert api.service.lanes.close(PATIENCE) is True
        for thread in threads:
            thread.join()
        assert gate.encoded.count(len(LLAMAS) + 1) == 1
        assert api.client.post("/tokenize", json={"text": LLAMAS}).status_code == 503


@cases
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


def test_a_clock_that_jumps_moves_no_limit(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, jumps = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + jumps[-1])
    with ready(loader(model_path), request_timeout=60, rate_limit="9/hour", header_timeout=5) as api:
        body = {"prompt": "a", "stream": True, "generate_kwargs": GREEDY}
        whole = [line for line in api.client.post("/chat", json=body).text.splitlines() if line]
        for jump in (1e8, -1e8, 0.0):
            with api.client.stream("POST", "/chat", json=body) as answer:
                lines = answer.iter_lines()
                begun = next(lines)
                jumps.append(jump)
                assert [begun, *filter(None, lines)][-1] == whole[-1]
        left = answer.headers["x-ratelimit-remaining-requests"]
        assert left == "5", "four of nine were taken, and no jump gave any back"
