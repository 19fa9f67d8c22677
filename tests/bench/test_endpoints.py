"""Each endpoint is asked in its own language: ours for real, the others by what they are known to send."""

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

from edge_phi3.bench import BenchError, ExchangeError
from edge_phi3.bench.endpoints import APIS, Answer, HttpClient, open_endpoint
from edge_phi3.bench.workload import Ask, Workload
from tests.bench.conftest import DATA, client_of
from tests.support.cases import cases
from tests.support.in_process import Running

GREEDY = Ask(["hello there"], 6, Workload())
WHOLE = Ask(["hello there"], 6, Workload(stream=False))
SAMPLED = Workload(temperature=0.7, top_k=20, top_p=0.9, ignore_eos=True)

LLAMA_SERVER_STREAM = (DATA / "llama_server_stream.txt").read_bytes()


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


def test_our_endpoints_answer_and_count_and_a_refusal_is_told_in_the_servers_own_words(service: Running) -> None:
    ways = itertools.product(("openai", "openai-chat"), (Workload(), Workload(stream=False)))
    for api, how in [("chat", SAMPLED), *ways]:
        answer = ask_ours(service, Ask(["hello there"], 6, how), api)
        assert answer.completion_tokens == 6, api
        assert (answer.prompt_tokens or 0) >= 2, api
        assert answer.text, api
    with pytest.raises(ExchangeError, match=r"HTTP 400.*max_new_tokens"):
        ask_ours(service, Ask(["hello"], 10**6, Workload()))


@pytest.mark.parametrize(("api", "how", "body"), json.loads((DATA / "requests.json").read_text()))
def test_each_api_is_sent_what_it_has_and_no_more(api: str, how: dict[str, Any], body: dict[str, Any]) -> None:
    assert APIS[api].body(Ask(["one", " two", " three"], 9, Workload(**how)), "m") == body


@given(cuts=st.lists(st.integers(0, len(LLAMA_SERVER_STREAM) + 20)), end=st.sampled_from([b"\n", b"\r\n"]))
def test_a_stream_is_read_wherever_the_network_cuts(cuts: list[int], end: bytes) -> None:
    body = LLAMA_SERVER_STREAM.replace(b'data: {"index', b'data:{"index', 1).replace(b"\n", end)

    async def pieces() -> AsyncIterator[bytes]:
        for start, stop in itertools.pairwise([0, *sorted(cuts), len(body) + 20]):
            yield body[start:stop]

    answer = generate(client_of(lambda _: httpx.Response(200, content=pieces())), "llama-server")
    assert answer.texts == ["вое", " rés"]
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (4, 2, 0)


@cases
def test_streams_that_fail_are_failures(api: str, stream: str | None, message: str) -> None:
    content = LLAMA_SERVER_STREAM[:-20] if stream is None else stream.encode()
    with pytest.raises(ExchangeError, match=message):
        generate(client_of(lambda _: httpx.Response(200, content=content)), api)


def test_failures_of_the_network_are_told() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"data: "
        raise httpx.RemoteProtocolError("peer closed connection")

    async def endless() -> AsyncIterator[bytes]:
        yield b"data: "
        await asyncio.Event().wait()

    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"http://127.0.0.1:{server.getsockname()[1]}"
    for client, message in (
        (HttpClient(free), rf"No connection to {free}: "),
        (client_of(lambda _: httpx.Response(200, content=broken())), "The connection broke: peer closed connection"),
        (client_of(lambda _: httpx.Response(200, content=endless()), timeout=0.05), r"No end of .* within 0\.05 s\."),
    ):
        with pytest.raises(ExchangeError, match=message):
            generate(client, "chat")


def test_the_key_and_the_addresss_own_path_are_sent_and_what_is_no_address_is_refused() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"Result": "fine"})

    assert generate(client_of(answer, "https://host/base/", api_key="secret"), "chat", WHOLE).text == "fine"
    assert str(seen[0].url) == "https://host/base/chat"
    assert seen[0].headers["authorization"] == "Bearer secret"
    for url in ("ftp://host", "http://", "http://host:port"):
        with pytest.raises(BenchError, match="address"):
            HttpClient(url)


def detect(paths: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name and the model of the endpoint that is found at a server that knows some paths."""

    def answer(request: httpx.Request) -> httpx.Response:
        found = paths.get(request.url.path)
        return httpx.Response(404) if found is None else httpx.Response(200, json=found)

    found = asyncio.run(open_endpoint(client_of(answer)))
    return found.name, found.model


def test_other_servers_are_recognised_by_what_they_answer() -> None:
    models = {"/version": {"version": "0.11"}, "/v1/models": {"data": [{"id": "phi"}]}}
    assert detect({"/props": {"total_slots": 4}} | models) == ("llama-server", "")
    assert detect(models) == ("openai", "phi")
    with pytest.raises(BenchError, match=r"No generation endpoint is found at .*HTTP 404.*--api"):
        detect({})
    with pytest.raises(BenchError, match="lists no models; name one with --model"):
        detect({"/v1/models": {"data": []}})
