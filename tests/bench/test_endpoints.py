"""Each endpoint is asked in its own language: ours for real, the others by what they are known to send."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_phi3.bench.endpoints import APIS, Answer, Endpoint, open_endpoint
from edge_phi3.bench.errors import BenchError, ExchangeError
from edge_phi3.bench.http_client import HttpClient
from edge_phi3.bench.workload import Ask, Workload
from tests.bench.conftest import client_of
from tests.support.in_process import Running

GREEDY = Ask(["hello there"], 6, Workload())
WHOLE = Ask(["hello there"], 6, Workload(stream=False))
SAMPLED = Workload(temperature=0.7, top_k=20, top_p=0.9, ignore_eos=True)


def generate(client: HttpClient, api: str, ask: Ask = GREEDY) -> Answer:
    async def scenario() -> Answer:
        answer = Answer()
        await (await open_endpoint(client, api, "m")).generate(ask, answer)
        await client.close()
        return answer

    return asyncio.run(scenario())


def ask_ours(service: Running, ask: Ask, api: str = "chat") -> Answer:
    return generate(HttpClient(f"127.0.0.1:{service.port}"), api, ask)


def test_chat_streams_its_tokens_and_counts_them(service: Running) -> None:
    streamed, whole = ask_ours(service, GREEDY, "auto"), ask_ours(service, WHOLE)
    assert (streamed.prompt_tokens, streamed.completion_tokens, streamed.ended) == (2, 6, True)
    assert 1 <= len(streamed.times) <= 6
    assert streamed.times == sorted(streamed.times)
    kwargs = {"do_sample": False, "max_new_tokens": 6}
    expected = service.chat(prompt="hello there", return_full_text=False, generate_kwargs=kwargs).json()["Result"]
    assert streamed.text == whole.text == expected
    assert whole.completion_tokens == 6


@pytest.mark.parametrize("api", ["openai", "openai-chat"])
@pytest.mark.parametrize("ask", [GREEDY, WHOLE], ids=["stream", "whole"])
def test_our_openai_endpoints_answer_and_count(service: Running, api: str, ask: Ask) -> None:
    answer = ask_ours(service, ask, api)
    assert answer.completion_tokens == 6
    assert (answer.prompt_tokens or 0) >= 2
    assert answer.text


def test_every_sampling_parameter_is_understood_by_ours(service: Running) -> None:
    assert ask_ours(service, Ask(["hello there"], 5, SAMPLED)).completion_tokens == 5


def test_a_refusal_is_told_in_the_servers_own_words(service: Running) -> None:
    with pytest.raises(ExchangeError, match=r"HTTP 400.*max_new_tokens"):
        ask_ours(service, Ask(["hello"], 10**6, Workload()))


def test_llama_server_gets_the_shortest_chain_of_samplers() -> None:
    ask = Ask(["one", " two", " three"], 9, Workload())
    body = APIS["llama-server"].body(ask, "")
    assert (body["prompt"], body["n_predict"]) == ("one two three", 9)
    assert (body["samplers"], body["top_k"]) == (["top_k"], 1)
    body = APIS["llama-server"].body(Ask(["one"], 9, SAMPLED), "")
    assert (body["temperature"], body["top_k"], body["top_p"], body["ignore_eos"]) == (0.7, 20, 0.9, True)


def test_openai_gets_only_what_its_api_has_unless_more_is_asked() -> None:
    turns = ["one", " two", " three"]
    assert APIS["openai"].body(Ask(turns, 9, Workload(stream=False)), "m") == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0.0,
        "prompt": "one two three",
    }
    body = APIS["openai-chat"].body(Ask(turns, 9, SAMPLED), "m")
    said = zip(("user", "assistant", "user"), turns, strict=True)
    assert body["messages"] == [{"role": role, "content": turn} for role, turn in said]
    assert (body["top_k"], body["ignore_eos"], body["min_tokens"]) == (20, True, 9)
    assert body["stream_options"] == {"include_usage": True}
    assert "prompt" not in body


# What llama-server (llama.cpp 0c1e570) sent for a prompt of four tokens and an n_predict of 2; of its last event the
# settings, the prompt and most timings are left out.
LLAMA_SERVER_STREAM = (
    'data: {"index":0,"content":"вое","tokens":[18072],"stop":false,"id_slot":-1,"tokens_predicted":1,'
    '"tokens_evaluated":4}\n\n'
    'data: {"index":0,"content":" rés","tokens":[6896],"stop":false,"id_slot":-1,"tokens_predicted":2,'
    '"tokens_evaluated":4}\n\n'
    'data: {"index":0,"content":"","tokens":[],"id_slot":1,"stop":true,"tokens_predicted":2,"tokens_evaluated":4,'
    '"has_new_line":false,"truncated":false,"stop_type":"limit","stopping_word":"","tokens_cached":5,'
    '"timings":{"cache_n":0,"prompt_n":4,"prompt_ms":14.28}}\n\n'
).encode()


@given(cuts=st.lists(st.integers(0, len(LLAMA_SERVER_STREAM) + 20)), end=st.sampled_from([b"\n", b"\r\n"]))
def test_a_stream_is_read_wherever_the_network_cuts(cuts: list[int], end: bytes) -> None:
    body = b": keep-alive\n\n" + LLAMA_SERVER_STREAM.replace(b'data: {"index', b'data:{"index', 1)
    body = body.replace(b"\n", end)

    async def pieces() -> AsyncIterator[bytes]:
        for start, stop in itertools.pairwise([0, *sorted(cuts), len(body) + 20]):
            yield body[start:stop]

    answer = generate(client_of(lambda _: httpx.Response(200, content=pieces())), "llama-server")
    assert answer.texts == ["вое", " rés"]
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (4, 2, 0)


@pytest.mark.parametrize(
    ("api", "stream", "message"),
    [
        ("llama-server", LLAMA_SERVER_STREAM[:250], "The stream ended before the answer did."),
        ("llama-server", b'data: {"error":{"code":500,"message":"no slot"}}\n\n', "no slot"),
        ("openai", b'data: {"choices":[{"text":"a"}]}\n\n', "The stream ended before the answer did."),
        ("openai", b'data: {"error":{"message":"overloaded"}}\n\ndata: [DONE]\n\n', "overloaded"),
        ("openai", b'data: {"error":"overloaded"}\n\n', "overloaded"),
        ("chat", b'event: error\ndata: {"detail":"The engine is broken."}\n\n', "The engine is broken."),
        ("chat", b"data: nonsense\n\n", "not JSON"),
        ("chat", b"data: [1]\n\n", "where an object belongs"),
    ],
)
def test_streams_that_fail_are_failures(api: str, stream: bytes, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        generate(client_of(lambda _: httpx.Response(200, content=stream)), api)


def test_failures_of_the_network_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with pytest.raises(ExchangeError, match=rf"No connection to http://127\.0\.0\.1:{free}: "):
        generate(HttpClient(f"http://127.0.0.1:{free}"), "chat")

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: "
        raise httpx.RemoteProtocolError("peer closed connection")

    with pytest.raises(ExchangeError, match="The connection broke: peer closed connection"):
        generate(client_of(lambda _: httpx.Response(200, content=pieces())), "chat")


def test_the_time_limit_ends_an_exchange() -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"data: "
        await asyncio.Event().wait()

    with pytest.raises(ExchangeError, match=r"No end of the response within 0\.05 s\."):
        generate(client_of(lambda _: httpx.Response(200, content=never()), timeout=0.05), "chat")


def test_the_key_and_the_addresss_own_path_are_sent() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"Result": "fine"})

    assert generate(client_of(answer, "https://host/base/", api_key="secret"), "chat", WHOLE).text == "fine"
    assert str(seen[0].url) == "https://host/base/chat"
    assert seen[0].headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BenchError, match="address"):
        HttpClient(url)


def detect(paths: Mapping[str, Any]) -> Endpoint:
    """Find the endpoint of a server that knows some paths."""

    def answer(request: httpx.Request) -> httpx.Response:
        found = paths.get(request.url.path)
        return httpx.Response(404) if found is None else httpx.Response(200, content=json.dumps(found))

    return asyncio.run(open_endpoint(client_of(answer)))


def test_other_servers_are_recognised_by_what_they_answer() -> None:
    llama = {"/props": {"total_slots": 4}, "/v1/models": {"data": [{"id": "x"}]}, "/version": {"version": "1"}}
    assert detect(llama).name == "llama-server"
    vllm = detect({"/version": {"version": "0.11"}, "/v1/models": {"data": [{"id": "phi"}]}})
    assert (vllm.name, vllm.model) == ("openai", "phi")


def test_a_server_without_an_endpoint_or_a_model_is_told_with_the_way_out() -> None:
    with pytest.raises(BenchError, match=r"No generation endpoint is found at .*HTTP 404.*--api"):
        detect({})
    with pytest.raises(BenchError, match="lists no models; name one with --model"):
        detect({"/v1/models": {"data": []}})
