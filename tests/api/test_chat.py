"""`POST /chat`: bodies and status codes, plain answers, streams, limits, and clients that leave."""

import contextlib
import http.client
import json
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai._streaming import SSEDecoder

from edge_phi3.conversion.convert import convert
from tests import paced
from tests.api.conftest import GREEDY, PROMPT, USER, Clock, Running, loader, ready
from tests.golden import pipeline as golden
from tests.support.cases import cases

ORIGINAL = Path(__file__).with_name("data") / "original_examples.txt"
LONG = {"do_sample": False, "max_new_tokens": 1500, "eos_token_id": -1}


def events(text: str) -> list[tuple[str, Any]]:
    """Parse server-sent events into pairs of name and JSON."""
    return [(each.event or "", each.json()) for each in SSEDecoder().iter_bytes(iter([text.encode()]))]


def test_a_prompt_or_what_a_template_makes_of_messages_is_continued(api: Running) -> None:
    response = api.chat(prompt=PROMPT, generate_kwargs=GREEDY)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    new = api.chat(prompt=PROMPT, return_full_text=False, generate_kwargs=GREEDY).json()
    assert list(new) == ["Result"]
    assert new["Result"]
    assert response.json() == {"Result": PROMPT + new["Result"]}
    nulls = dict.fromkeys(["return_full_text", "clean_up_tokenization_spaces", "prefix", "handle_long_generation"])
    assert api.chat(prompt=PROMPT, messages=None, generate_kwargs=GREEDY, **nulls).json() == response.json()
    assert api.chat(prompt=PROMPT, generate_kwargs=None).status_code == 200
    assert api.chat(messages=USER, return_full_text=False, generate_kwargs=GREEDY).json() == new


@pytest.mark.parametrize("command", ORIGINAL.read_text(encoding="utf-8").split("\n\n")[1:])
def test_an_example_of_the_original_s_document_answers(api: Running, command: str) -> None:
    words = shlex.split(command)
    body = json.loads(words[words.index("-d") + 1])
    here = command.replace("<SERVICE>:80", f"127.0.0.1:{api.port}").replace("curl", "curl --silent --fail", 1)
    answer = json.loads(subprocess.run(["bash", "-c", here], capture_output=True, text=True, check=True).stdout)
    assert list(answer) == ["Result"]
    full_text = body.get("return_full_text", True)
    assert answer["Result"].removeprefix(body["prompt"])
    assert answer["Result"].startswith(body["prompt"]) is full_text


def test_the_details_of_a_generation_are_returned_when_asked_for(api: Running) -> None:
    kwargs = {**GREEDY, "return_dict_in_generate": True}
    body = api.chat(prompt=PROMPT, generate_kwargs=kwargs).json()
    assert set(body) == {"Result", "sequences", "sequences_scores", "scores", "usage"}
    assert body["sequences_scores"] is body["scores"] is None
    assert body["usage"]["completion_tokens"] == 8
    assert len(body["sequences"][0]) == body["usage"]["prompt_tokens"] + 8

    body = api.chat(prompt=PROMPT, generate_kwargs={**kwargs, "output_scores": True, "num_beams": 2}).json()
    assert len(body["sequences_scores"]) == 1
    chosen = [score["token_id"] for score in body["scores"][0]]
    assert chosen == body["sequences"][0][body["usage"]["prompt_tokens"] :]

    infinite = api.chat(prompt=PROMPT, generate_kwargs={**kwargs, "num_beams": 2, "length_penalty": -1e6}).json()
    assert infinite["sequences_scores"] == [None]


@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": ""}, {"messages": []}])
def test_a_missing_prompt_has_the_original_s_answer(api: Running, body: dict[str, Any]) -> None:
    response = api.chat(**body)
    assert response.status_code == 400
    assert response.json() == {"detail": "Text generation parameter prompt required"}


@cases
def test_a_wrong_request_is_a_sentence_on_the_field(api: Running, body: dict[str, Any] | str, sentence: str) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    content = text.replace("NESTED", "[" * 50_000 + "]" * 50_000).replace("LONG", "1" * 5000).encode("latin-1")
    response = api.client.post("/chat", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert list(response.json()) == ["detail"]
    assert sentence in response.json()["detail"]


@cases
def test_a_stream_holds_each_text_s_pieces_then_the_answer(api: Running, kwargs: dict[str, Any], count: int) -> None:
    kwargs = {**GREEDY, "max_new_tokens": 20, **kwargs}
    body = {"prompt": PROMPT, "return_full_text": False, "generate_kwargs": kwargs}
    plain = api.chat(**body).json()
    with paced.slowly():  # tokens wait for each other no longer than for --stream-interval
        response = api.chat(stream=True, **body)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(response.text)
    assert last == ("result", plain)
    assert {name for name, _ in pieces} <= {""}
    texts = ["".join(piece["text"] for _, piece in pieces if piece["index"] == index) for index in range(count)]
    assert len(set(texts)) == count
    assert len(pieces) > count or not (pieces or texts)
    assert "".join(texts) == (plain["Result"] if count else "")


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The service with the model that transformers' text-generation pipeline was recorded on."""
    folder = tmp_path_factory.mktemp("pipeline")
    golden.write_model(folder)
    with ready(loader(convert(folder, folder / "pipeline.gguf", outtype="f32").path)) as it:
        yield it


@pytest.mark.parametrize("index", range(len(golden.cases())))
def test_texts_and_their_pieces_are_those_of_transformers(recorder: Running, index: int) -> None:
    case, text = golden.cases()[index], "".join(golden.recorded()[index])
    kwargs = {"do_sample": False} | case.pop("kwargs")
    *pieces, last = events(recorder.chat(**case, stream=True, generate_kwargs=kwargs).text)
    assert last == ("result", {"Result": text})
    streamed = "".join(piece["text"] for _, piece in pieces)
    assert text.endswith(streamed)
    assert bool(streamed) is ("num_beams" not in kwargs)
    assert streamed == text or case.get("return_full_text", True) or not streamed


@pytest.mark.parametrize("around", [b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_sequence(api: Running, stream: bool, around: bytes) -> None:
    engine = api.service.pipeline.engine

    def idle() -> bool:
        stats = engine.stats()
        return stats.running == stats.waiting == stats.sequences == 0

    api.wait_until(idle)
    generated = engine.stats().totals.generated
    body = json.dumps({"prompt": PROMPT, "stream": stream, "generate_kwargs": LONG})
    with paced.slowly(), contextlib.closing(http.client.HTTPConnection("127.0.0.1", api.port)) as connection:
        connection.connect()
        connection.sock.sendall(around)
        connection.request("POST", "/chat", body, {"Content-Type": "application/json"})
        connection.sock.sendall(around)
        api.wait_until(lambda: engine.stats().running == 1)
        if stream:
            assert connection.getresponse().status == 200
        connection.close()
        api.wait_until(idle)
    # Whose tokens are counted when they finish.
    assert engine.stats().totals.generated == generated


def test_limits_are_named_in_the_refusal(model_path: Path) -> None:
    limits: dict[str, Any] = {"max_new_tokens": 10, "max_sequences": 3, "max_body_size": 2048}
    with ready(loader(model_path), **limits) as api:
        four = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 2}
        for body, status, name in (
            ({"prompt": "a", "generate_kwargs": {"max_new_tokens": 11}}, 400, "--max-new-tokens"),
            ({"prompt": "a", "generate_kwargs": four}, 400, "--max-sequences"),
            ({"prompt": "a" * 2048}, 413, "--max-body-size"),
        ):
            response = api.chat(**body)
            assert response.status_code == status
            assert name in response.json()["detail"]
        assert api.chat(prompt="a", generate_kwargs={"max_new_tokens": 10}).status_code == 200


def test_a_full_queue_is_429_what_never_fits_400_and_too_long_a_wait_504(model_path: Path, clock: Clock) -> None:
    slow = {"prompt": PROMPT, "generate_kwargs": LONG | {"max_new_tokens": 12000}}

    def refusals(status: int, **body: Any) -> list[httpx.Response]:
        found = [api.chat(**body, stream=stream) for stream in (False, True)]
        assert [response.status_code for response in found] == [status] * 2
        return found

    load = loader(model_path, parallel=1, max_queue=1, ctx_size=16384)
    with ready(load, request_timeout=60, max_new_tokens=0) as api, paced.slowly(), ThreadPoolExecutor(1) as pool:
        with api.client.stream("POST", "/chat", json=slow | {"stream": True}) as begun:
            pieces = begun.iter_text()
            text = next(pieces)
            waits = pool.submit(api.chat, **slow)
            try:
                api.wait_until(lambda: api.service.pipeline.engine.stats().waiting == 1)
                for response in refusals(429, **slow):
                    assert response.headers["retry-after"] == "1"
                    assert "queue is full" in response.json()["detail"]
                for never in ({"max_new_tokens": 0}, {"num_beams": 2}):
                    refusals(400, prompt="a", generate_kwargs={"do_sample": False} | never)
            finally:
                clock.now += 61
            text += "".join(pieces)
        assert begun.status_code == 200
        assert waits.result().status_code == 504
    name, data = events(text)[-1]
    assert name == "error"
    assert "time limit" in data["detail"]
    assert text.endswith("\n\n")
