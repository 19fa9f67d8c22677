"""Each endpoint is asked in its own language: ours for real, the others by what they are known to send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from edge_phi3.bench.answers import Answer
from edge_phi3.bench.errors import BenchError, ExchangeError, StatusError
from edge_phi3.bench.http_client import HttpClient
from edge_phi3.bench.targets import TARGETS, Ask, Sampling, Target, open_target
from tests.bench.conftest import read_request, replying, response, talk
from tests.support.in_process import Running

ASK = Ask(["hello there"], 6, Sampling(), ignore_eos=False, seed=None, stream=True)
SAMPLED = Sampling(temperature=0.7, top_k=20, top_p=0.9)


def ask(service: Running, asked: Ask, api: str = "chat") -> Answer:
    async def scenario() -> Answer:
        client = HttpClient(f"http://127.0.0.1:{service.port}")
        answer = Answer()
        await (await open_target(client, api)).generate(asked, answer)
        client.close()
        return answer

    return asyncio.run(scenario())


def test_chat_streams_its_tokens_and_counts_them(service: Running) -> None:
    answer = ask(service, ASK)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.ended) == (2, 6, True)
    assert 1 <= len(answer.times) <= 6
    whole = service.chat(
        prompt="hello there", return_full_text=False, generate_kwargs={"do_sample": False, "max_new_tokens": 6}
    )
    assert answer.text == whole.json()["Result"]


def test_chat_without_streaming_gives_the_same(service: Running) -> None:
    streamed = ask(service, ASK)
    whole = ask(service, Ask(ASK.turns, 6, Sampling(), ignore_eos=False, seed=None, stream=False))
    assert (whole.text, whole.completion_tokens) == (streamed.text, 6)


@pytest.mark.parametrize("api", ["openai", "openai-chat"])
@pytest.mark.parametrize("stream", [True, False])
def test_our_openai_endpoints_answer_and_count(service: Running, api: str, stream: bool) -> None:
    answer = ask(service, Ask(ASK.turns, 6, Sampling(), ignore_eos=False, seed=None, stream=stream), api)
    assert answer.completion_tokens == 6
    assert answer.prompt_tokens is not None
    assert answer.prompt_tokens >= 2
    assert answer.text


def test_every_sampling_parameter_is_understood_by_ours(service: Running) -> None:
    asked = Ask(ASK.turns, 5, SAMPLED, ignore_eos=True, seed=11, stream=True)
    first, again = ask(service, asked), ask(service, asked)
    assert first.text == again.text, "the seed is used"
    assert first.completion_tokens == 5


def test_a_refusal_of_ours_is_told_in_its_own_words(service: Running) -> None:
    with pytest.raises(StatusError, match=r"HTTP 400.*max_new_tokens") as refusal:
        ask(service, Ask(ASK.turns, 10**6, Sampling(), ignore_eos=False, seed=None, stream=True))
    assert refusal.value.status == 400


def test_ours_is_recognised(service: Running) -> None:
    async def scenario() -> str:
        client = HttpClient(f"http://127.0.0.1:{service.port}")
        name = (await open_target(client)).name
        client.close()
        return name

    assert asyncio.run(scenario()) == "chat"


def request_of(api: str, sampling: Sampling, **changes: Any) -> Mapping[str, Any]:
    fields: dict[str, Any] = {"ignore_eos": False, "seed": None, "stream": True} | changes
    turns = ["one", " two", " three"]
    return TARGETS[api](HttpClient("http://nowhere"), "m").request(Ask(turns, 9, sampling, **fields))


def test_llama_server_gets_the_shortest_chain_of_samplers() -> None:
    body = request_of("llama-server", Sampling())
    assert (body["prompt"], body["n_predict"]) == ("one two three", 9)
    assert (body["samplers"], body["top_k"]) == (["top_k"], 1)
    assert "seed" not in body
    body = request_of("llama-server", SAMPLED, seed=3, ignore_eos=True)
    assert (body["temperature"], body["top_k"], body["top_p"]) == (0.7, 20, 0.9)
    assert (body["seed"], body["ignore_eos"]) == (3, True)


def test_openai_gets_only_what_its_api_has_unless_more_is_asked() -> None:
    assert request_of("openai", Sampling(), stream=False) == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0.0,
        "prompt": "one two three",
    }
    body = request_of("openai-chat", SAMPLED, ignore_eos=True)
    assert body["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " two"},
        {"role": "user", "content": " three"},
    ]
    assert (body["top_k"], body["ignore_eos"], body["min_tokens"]) == (20, True, 9)
    assert body["stream_options"] == {"include_usage": True}


# What llama-server (llama.cpp 0c1e570) sent for a prompt of four tokens and an n_predict of 4; of its last event the
# settings, the prompt and most timings are left out.
LLAMA_SERVER_STREAM = (
    'data: {"index":0,"content":"вое","tokens":[18072],"stop":false,"id_slot":-1,"tokens_predicted":1,'
    '"tokens_evaluated":4}\n\n'
    'data: {"index":0,"content":" rés","tokens":[6896],"stop":false,"id_slot":-1,"tokens_predicted":2,'
    '"tokens_evaluated":4}\n\n'
    'data: {"index":0,"content":" fri","tokens":[3484],"stop":false,"id_slot":-1,"tokens_predicted":3,'
    '"tokens_evaluated":4}\n\n'
    'data: {"index":0,"content":" agent","tokens":[10823],"stop":false,"id_slot":-1,"tokens_predicted":4,'
    '"tokens_evaluated":4}\n\n'
    'data: {"index":0,"content":"","tokens":[],"id_slot":1,"stop":true,"tokens_predicted":4,"tokens_evaluated":4,'
    '"has_new_line":false,"truncated":false,"stop_type":"limit","stopping_word":"","tokens_cached":7,'
    '"timings":{"cache_n":0,"prompt_n":4,"prompt_ms":14.28}}\n\n'
).encode()


def generate(api: str, body: bytes) -> Answer:
    async def ask(client: HttpClient) -> Answer:
        answer = Answer()
        await TARGETS[api](client, "m").generate(ASK, answer)
        return answer

    return talk(replying(response(body)), ask)


def test_llama_servers_stream_is_read() -> None:
    answer = generate("llama-server", LLAMA_SERVER_STREAM)
    assert answer.text == "вое rés fri agent"
    assert len(answer.times) == 4
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (4, 4, 0)


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
    ],
)
def test_streams_that_fail_are_failures(api: str, stream: bytes, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        generate(api, stream)


def detect(paths: Mapping[str, Any]) -> Target:
    """Find the endpoint of a server that knows some paths."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            line, _ = await read_request(reader)
            found = paths.get(line.split()[1])
            writer.write(response(b"", "404 Not Found") if found is None else response(json.dumps(found).encode()))

    return talk(answer, open_target)


def test_other_servers_are_recognised_by_what_they_answer() -> None:
    llama = {"/props": {"total_slots": 4}, "/v1/models": {"data": [{"id": "x"}]}, "/version": {"version": "1"}}
    assert detect(llama).name == "llama-server"
    vllm = detect({"/version": {"version": "0.11"}, "/v1/models": {"data": [{"id": "phi"}]}})
    assert (vllm.name, vllm.model) == ("openai", "phi")


def test_a_server_without_an_endpoint_is_told_with_the_way_out() -> None:
    with pytest.raises(BenchError, match=r"No generation endpoint is found at .*HTTP 404.*--api"):
        detect({})


def test_a_server_without_models_is_told() -> None:
    with pytest.raises(BenchError, match="lists no models; name one with --model"):
        detect({"/v1/models": {"data": []}})
