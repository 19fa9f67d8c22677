"""`POST /chat`: bodies and status codes, plain answers, streams, limits, and clients that leave."""

from __future__ import annotations

import functools
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import paced
from tests.api.conftest import GREEDY, PROMPT, Clock, Running, loader, ready

LONG = {"do_sample": False, "max_new_tokens": 1500, "eos_token_id": -1}


def events(response: httpx.Response) -> list[tuple[str, Any]]:
    """Parse server-sent events into pairs of name and JSON."""
    found = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


def idle(api: Running) -> bool:
    """Return whether the engine holds nothing of any request."""
    stats = api.service.pipeline.engine.stats()
    return stats.running == stats.waiting == stats.sequences == 0


def test_a_prompt_is_continued_and_the_full_text_returned(api: Running) -> None:
    response = api.chat(prompt="json.dumps", generate_kwargs=GREEDY)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["Result"]
    full = response.json()["Result"]
    assert full.startswith("json.dumps")
    assert len(full) > len("json.dumps")
    new = api.chat(prompt="json.dumps", return_full_text=False, generate_kwargs=GREEDY).json()["Result"]
    assert full == "json.dumps" + new


def test_messages_are_answered_as_the_prompt_that_their_template_makes(api: Running) -> None:
    by_prompt = api.chat(prompt=PROMPT, return_full_text=False, generate_kwargs=GREEDY)
    messages = [{"role": "user", "content": "What does json.dumps do?"}]
    assert api.chat(messages=messages, generate_kwargs=GREEDY).json() == by_prompt.json()


def test_explicit_nulls_mean_the_defaults(api: Running) -> None:
    nulls = ["messages", "return_full_text", "clean_up_tokenization_spaces", "prefix", "handle_long_generation"]
    plain = api.chat(prompt="json", generate_kwargs=GREEDY).json()
    assert api.chat(prompt="json", generate_kwargs=GREEDY, **dict.fromkeys(nulls)).json() == plain
    assert api.chat(prompt="json", generate_kwargs=None).status_code == 200


def test_the_details_of_a_generation_are_returned_when_asked_for(api: Running) -> None:
    kwargs = {**GREEDY, "return_dict_in_generate": True}
    body = api.chat(prompt=PROMPT, generate_kwargs=kwargs).json()
    assert set(body) == {"Result", "sequences", "sequences_scores", "scores", "usage"}
    assert body["sequences_scores"] is None
    assert body["scores"] is None
    assert body["usage"]["completion_tokens"] == 8
    assert len(body["sequences"][0]) == body["usage"]["prompt_tokens"] + 8

    body = api.chat(prompt=PROMPT, generate_kwargs={**kwargs, "output_scores": True, "num_beams": 2}).json()
    assert len(body["sequences_scores"]) == 1
    chosen = [score["token_id"] for score in body["scores"][0]]
    assert chosen == body["sequences"][0][body["usage"]["prompt_tokens"] :]


def test_a_missing_prompt_has_the_original_s_answer(api: Running) -> None:
    bodies: tuple[dict[str, Any], ...] = ({}, {"prompt": None}, {"prompt": ""}, {"messages": []})
    for body in bodies:
        response = api.chat(**body)
        assert response.status_code == 400
        assert response.json() == {"detail": "Text generation parameter prompt required"}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"prompt": "a", "promt": "b"}, "`promt` is not a field of this request; did you mean `prompt`?"),
        ({"prompt": "a", "temperature": 1}, "`temperature` belongs inside `generate_kwargs`."),
        ({"prompt": "a", "zzz": 1}, "`zzz` is not a field of this request; known: prompt, messages,"),
        ({"prompt": 1}, "`prompt` must be a text or null, but is an integer."),
        ({"prompt": "a", "return_full_text": "no"}, "`return_full_text` must be true or false or null, but is a text."),
        ({"prompt": "a", "stream": None}, "`stream` must be true or false, but is null."),
        ({"prompt": "a", "generate_kwargs": []}, "`generate_kwargs` must be an object or null, but is a list."),
        ({"messages": [{"role": "user"}]}, "`messages[0].content` is missing."),
        ({"messages": [{"role": "user", "content": 1}]}, "`messages[0].content` must be a text, but is an integer."),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "`messages[0]` has a field `x`,"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "role must be one of system, user, assistant"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "Give prompt or messages, not both."),
        ({"prompt": "a", "generate_kwargs": {"temperatur": 1}}, "Did you mean `temperature`?"),
        ({"prompt": "a", "generate_kwargs": {"guidance_scale": 2}}, "`guidance_scale` is not supported"),
        ({"prompt": "a", "handle_long_generation": "pit"}, "handle_long_generation must be null or 'hole'"),
    ],
)
def test_a_wrong_request_is_one_sentence_that_names_the_field(
    api: Running, body: dict[str, Any], sentence: str
) -> None:
    response = api.chat(**body)
    assert response.status_code == 400
    assert list(response.json()) == ["detail"]
    assert sentence in response.json()["detail"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "The body is not valid JSON"),
        (b"{", "The body is not valid JSON"),
        (b"[]", "The body must be an object, but is a list."),
        (b'{"prompt": "\xff"}', "The body is not valid JSON"),
        (b'{"prompt": "\\ud800"}', "The body is not valid JSON"),
        (b'{"prompt": "a", "generate_kwargs": {"top_p": NaN}}', "The body is not valid JSON"),
        (b'{"prompt": "a", "generate_kwargs": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", "nested too deeply"),
        (b'{"prompt": "a", "generate_kwargs": {"top_k": ' + b"1" * 5000 + b"}}", ""),
    ],
)
def test_a_body_that_is_no_json_is_refused(api: Running, content: bytes, sentence: str) -> None:
    response = api.client.post("/chat", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert sentence in response.json()["detail"]


def test_a_body_that_is_not_said_to_be_json_is_refused(api: Running) -> None:
    response = api.client.post("/chat", data={"prompt": "a"})
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["detail"]


def test_a_stream_holds_the_pieces_and_then_the_plain_answer(api: Running) -> None:
    body = {"prompt": PROMPT, "return_full_text": False, "generate_kwargs": {**GREEDY, "max_new_tokens": 20}}
    plain = api.chat(**body).json()
    with paced.slowly():  # tokens wait for each other no longer than for --stream-interval
        response = api.chat(stream=True, **body)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(response)
    assert last == ("result", plain)
    assert len(pieces) > 1
    assert {name for name, _ in pieces} == {""}
    assert "".join(piece["text"] for _, piece in pieces) == plain["Result"]


def test_a_stream_of_several_sequences_tells_them_apart(api: Running) -> None:
    kwargs = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "seed": 5}
    *pieces, (_, result) = events(api.chat(prompt=PROMPT, return_full_text=False, stream=True, generate_kwargs=kwargs))
    texts = ["".join(piece["text"] for _, piece in pieces if piece["index"] == index) for index in range(3)]
    assert "".join(texts) == result["Result"]
    assert len(set(texts)) == 3


def test_beam_search_streams_its_result_alone(api: Running) -> None:
    kwargs = {**GREEDY, "num_beams": 3}
    found = events(api.chat(prompt=PROMPT, stream=True, generate_kwargs=kwargs))
    assert [name for name, _ in found] == ["result"]
    assert found[0][1] == api.chat(prompt=PROMPT, generate_kwargs=kwargs).json()


def test_a_stream_that_is_refused_keeps_its_status_code(api: Running) -> None:
    response = api.chat(prompt="a", stream=True, generate_kwargs={"temperature": -1})
    assert response.status_code == 400
    assert "temperature" in response.json()["detail"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_sequence(api: Running, stream: bool) -> None:
    api.wait_until(lambda: idle(api))
    generated = api.service.pipeline.engine.stats().generated_tokens_total
    body = json.dumps({"prompt": PROMPT, "stream": stream, "generate_kwargs": LONG}).encode()
    with paced.slowly(), socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(
            b"POST /chat HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        api.wait_until(lambda: api.service.pipeline.engine.stats().running == 1)
        if stream:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        connection.close()
        api.wait_until(lambda: idle(api))
    # Whose tokens are counted when they finish.
    assert api.service.pipeline.engine.stats().generated_tokens_total == generated


def test_limits_are_named_in_the_refusal(model_path: Path) -> None:
    limits = {"max_new_tokens": 10, "max_sequences": 3, "max_body_size": 2048}
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


def test_a_full_queue_is_answered_429_and_an_overlong_wait_504(model_path: Path, clock: Clock) -> None:
    load = loader(model_path, parallel=1, max_queue=1, ctx_size=16384)
    with ready(load, request_timeout=60, max_new_tokens=16000) as api, paced.slowly():
        engine = api.service.pipeline.engine
        slow = {"prompt": PROMPT, "generate_kwargs": LONG | {"max_new_tokens": 12000}}

        def one_runs(waiting: int) -> bool:
            return (engine.stats().running, engine.stats().waiting) == (1, waiting)

        with ThreadPoolExecutor(2) as pool:
            answers = []
            for count in range(2):  # the first runs before the second waits
                answers.append(pool.submit(api.chat, **slow))
                api.wait_until(functools.partial(one_runs, count))
            for stream in (False, True):
                response = api.chat(stream=stream, **slow)
                assert (response.status_code, response.headers["retry-after"]) == (429, "1")
                assert "queue is full" in response.json()["detail"]
            clock.now += 61
        assert [answer.result().status_code for answer in answers] == [504, 504]


def test_a_stream_that_runs_out_of_time_ends_with_the_error(model_path: Path, clock: Clock) -> None:
    body = {"prompt": PROMPT, "stream": True, "generate_kwargs": LONG | {"max_new_tokens": 12000}}
    load = loader(model_path, ctx_size=16384)
    with ready(load, request_timeout=60, max_new_tokens=16000) as api, paced.slowly():
        with api.client.stream("POST", "/chat", json=body) as response:
            assert response.status_code == 200
            pieces = response.iter_text()
            text = next(pieces)
            clock.now += 61
            text += "".join(pieces)
        assert "time limit" in json.loads(text.split("event: error\ndata: ")[1])["detail"]
        assert text.endswith("\n\n")
