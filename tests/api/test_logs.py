"""Request ids, and what is and is not written to the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.api.logs import configure_logging
from tests.api.conftest import GREEDY, Running, loader, ready

SECRETS = {"prompt": "the-secret-prompt", "key": "the-secret-key"}


@pytest.fixture
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(text: str) -> list[dict[str, Any]]:
    """Parse JSON log lines."""
    return [json.loads(line) for line in text.splitlines()]


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


@pytest.mark.usefixtures("_restored_logging")
def test_a_request_is_one_line_with_its_counts_and_times(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    with ready(loader(model_path), api_key=[SECRETS["key"]]) as api:
        api.client.headers["x-api-key"] = SECRETS["key"]
        body = {"prompt": SECRETS["prompt"], "generate_kwargs": {**GREEDY, "eos_token_id": -1}}
        api.client.post("/chat", json=body, headers={"x-request-id": "mine"})
        api.client.post("/chat", json={"prompt": SECRETS["prompt"], "generate_kwargs": {"top_p": 9}})
        api.client.get("/healthz")
    errors = capsys.readouterr().err
    found = [line for line in lines(errors) if line["event"] == "POST /chat"]
    assert len(found) == 2
    line = found[0]
    assert line["request_id"] == "mine"
    assert (line["status"], line["completion_tokens"], line["finish"]) == (200, 8, "length")
    assert line["prompt_tokens"] > 0
    assert 0 <= line["queue_ms"] <= line["ttft_ms"] <= line["ms"]
    assert line["tokens_per_second"] > 0
    assert found[1]["status"] == 400
    assert "healthz" not in errors
    for secret in SECRETS.values():
        assert secret not in errors


@pytest.mark.usefixtures("_restored_logging")
def test_prompts_are_logged_only_when_asked_for(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info")
    with ready(loader(model_path), log_prompts=True) as api:
        answer = api.chat(prompt=SECRETS["prompt"], generate_kwargs=GREEDY).json()["Result"]
        api.chat(messages=[{"role": "user", "content": SECRETS["prompt"]}], generate_kwargs=GREEDY)
    first, second = (line for line in lines(capsys.readouterr().err) if line["event"] == "POST /chat")
    assert (first["prompt"], first["answer"]) == (SECRETS["prompt"], answer)
    assert SECRETS["prompt"] in second["prompt"]


@pytest.mark.usefixtures("_restored_logging")
def test_text_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text", "warning")
    logging.getLogger("edge_phi3.engine").warning("The window moved.")
    logging.getLogger("edge_phi3.engine").info("not shown")
    written = capsys.readouterr().err
    assert "The window moved." in written
    assert "warning" in written
    assert "not shown" not in written


@pytest.mark.usefixtures("_restored_logging")
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_an_error_that_nobody_foresaw_is_logged_and_not_told(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log_format: Any
) -> None:
    configure_logging(log_format, "info")
    with ready(loader(model_path)) as api:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("inner workings")

        monkeypatch.setattr(api.service.pipeline, "prepare", fail)
        response = api.chat(prompt=SECRETS["prompt"])
    assert response.status_code == 500
    assert "inner workings" not in response.text
    assert "X-Request-Id" in response.json()["detail"]
    written = capsys.readouterr().err
    assert "RuntimeError: inner workings" in written
    assert SECRETS["prompt"] not in written
    if log_format == "json":
        (line,) = (line for line in lines(written) if line["level"] == "error")
        assert "Traceback" in line["exception"]
