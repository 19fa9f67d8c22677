"""While a long text is turned into tokens, or back, the service answers others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.api.conftest import PATIENCE, Running

LONG = "a long story " * 4000
SHORT = "a short story"
CASES = [
    ("/chat", "prepare", {"prompt": LONG}),
    ("/v1/chat/completions", "prepare", {"messages": [{"role": "user", "content": LONG}]}),
    ("/v1/completions", "prepare", {"prompt": LONG}),
    ("/tokenize", "tokenize", {"text": LONG}),
    ("/detokenize", "detokenize", {"tokens": [300] * len(LONG)}),
]


@pytest.mark.parametrize(("path", "method", "body"), CASES, ids=[case[0] for case in CASES])
def test_others_are_answered_meanwhile(
    api: Running, monkeypatch: pytest.MonkeyPatch, path: str, method: str, body: dict[str, Any]
) -> None:
    pipeline = api.service.pipeline
    works = getattr(pipeline, method)
    begun, answered = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert answered.wait(PATIENCE)
        return works(*args, **kwargs)

    monkeypatch.setattr(type(pipeline), method, lambda _, *args, **kwargs: slow(*args, **kwargs))
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(api.client.post, path, json=body)
        assert begun.wait(PATIENCE)
        assert api.client.get("/healthz").status_code == 200
        answered.set()
        assert long.result().status_code in {200, 400}


def test_a_short_text_is_spared_the_thread(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    pipeline = api.service.pipeline
    tokenize = pipeline.tokenize

    def noted(_: Any, text: str, **kwargs: Any) -> list[int]:
        threads.append(threading.get_ident())
        return tokenize(text, **kwargs)

    monkeypatch.setattr(type(pipeline), "tokenize", noted)
    for text in (SHORT, SHORT, LONG):
        assert api.client.post("/tokenize", json={"text": text}).status_code == 200
    first, second, third = threads
    assert first == second != third
