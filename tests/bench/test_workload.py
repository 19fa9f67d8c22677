"""What the simulated users ask, and how long it is: sessions, their lengths, and prompts from files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.bench.answers import Answer
from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.http_client import HttpClient
from edge_phi3.bench.targets import Ask, ChatTarget, OpenAITarget, open_target
from edge_phi3.bench.workload import WORDS, FileSessions, Lengths, RandomSessions, Ruler, Workload, measure_ruler
from tests.bench.conftest import read_request, replying, response, talk
from tests.support.in_process import Running

RULER = Ruler(WORDS, 1.0, 0, exact=True)


def test_a_seed_asks_the_same_again_and_another_asks_something_else() -> None:
    workload = Workload(prompt_tokens="10-50", output_tokens="exponential:20", turns="1-3", seed=7)
    first, again = RandomSessions(workload, RULER), RandomSessions(workload, RULER)
    assert [first(i) for i in range(20)] == [again(i) for i in range(20)]
    assert first(0) != first(1)
    other = RandomSessions(Workload(prompt_tokens="10-50", seed=8), RULER)
    assert first(0).users != other(0).users


def test_lengths_turns_and_outputs_follow_the_workload() -> None:
    sessions = RandomSessions(Workload(prompt_tokens="40", output_tokens="5-9", turns="2-4"), RULER)
    drawn = [sessions(number) for number in range(200)]
    assert {len(text.split()) for session in drawn for text in session.users} == {40}
    assert {len(session.users) for session in drawn} == {2, 3, 4}
    assert {tokens for session in drawn for tokens in session.max_tokens} == {5, 6, 7, 8, 9}


def test_shared_prefixes_stand_in_front_of_the_first_turn_only() -> None:
    sessions = RandomSessions(Workload(prompt_tokens="10", turns="2", shared_prefix=100, prefixes=3), RULER)
    drawn = [sessions(number) for number in range(60)]
    assert {len(session.users[0].split()) for session in drawn} == {110}
    assert {len(session.users[1].split()) for session in drawn} == {10}
    assert len({tuple(session.users[0].split()[:100]) for session in drawn}) == 3
    assert len({session.users[0] for session in drawn}) == 60


def test_each_turn_carries_the_conversation_so_far() -> None:
    workload = Workload(prompt_tokens="3", turns="2", temperature=0.5, top_k=4, send_seeds=True)
    session = RandomSessions(workload, RULER)(0)
    first = session.ask([], workload)
    second = session.ask([*first.turns, "the answer"], workload)
    assert list(second.turns) == [session.users[0], "the answer", session.users[1]]
    assert None is not first.seed != second.seed
    assert first.sampling.temperature == 0.5


def test_seeds_are_sent_to_those_who_sample_and_on_request_only() -> None:
    for workload in (Workload(temperature=1.0), Workload(send_seeds=True)):
        assert RandomSessions(workload, RULER)(0).ask([], workload).seed is None


def test_prompts_have_exactly_the_tokens_asked_for(service: Running) -> None:
    async def scenario() -> tuple[Ruler, int, int]:
        client = HttpClient(f"http://127.0.0.1:{service.port}")
        target = await open_target(client)
        ruler = await measure_ruler(target)
        workload = Workload(prompt_tokens="37", shared_prefix=20, output_tokens="2", turns="2")
        session = RandomSessions(workload, ruler)(0)
        answer = Answer()
        ask = session.ask([], workload)
        await target.generate(ask, answer)
        assert answer.prompt_tokens is not None
        second = await target.count_tokens(session.users[1].lstrip())
        client.close()
        assert second is not None
        return ruler, answer.prompt_tokens, second

    ruler, first, second = asyncio.run(scenario())
    assert ruler.exact
    assert len(ruler.words) > len(WORDS) / 2
    assert (first, second) == (57, 37)


def test_without_a_tokenizer_the_mean_length_of_words_is_measured() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            line, body = await read_request(reader)
            if "/tokenize" in line:
                writer.write(response(b"", "404 Not Found"))
                continue
            words = len(json.loads(body)["prompt"].split())
            usage = {"prompt_tokens": 2 * words, "completion_tokens": 1}
            events: list[Any] = [{"choices": [{"text": "x"}]}, {"choices": [], "usage": usage}]
            stream = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
            writer.write(response(stream + b"data: [DONE]\n\n"))

    ruler = talk(answer, lambda client: measure_ruler(OpenAITarget(client, "m")))
    assert not ruler.exact
    assert ruler.tokens_per_word == 2
    text = ruler.text(40, np.random.default_rng(0), first=True)
    assert len(text.split()) == 20


def test_a_server_that_does_not_generate_is_told() -> None:
    refusing = replying(*[response(b"no", "404 Not Found")] * 9)
    with pytest.raises(BenchError, match="/chat does not generate: HTTP 404: no"):
        talk(refusing, lambda client: measure_ruler(ChatTarget(client)))


def test_prompts_from_a_file_are_all_asked_before_any_comes_again(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('plain text\n\n{"prompt": "short", "max_tokens": 3}\n{"prompt": "long"}\n', encoding="utf-8")
    sessions = FileSessions(file, Workload(output_tokens="9"))
    drawn = [sessions(number) for number in range(6)]
    asked = {(session.users[0], session.max_tokens[0]) for session in drawn[:3]}
    assert asked == {("plain text", 9), ("short", 3), ("long", 9)}
    assert [session.users for session in drawn[3:]] == [session.users for session in drawn[:3]]
    assert isinstance(sessions(0).ask([], Workload()), Ask)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n \n", "holds no prompt"),
        ('ok\n{"text": "a"}', "line 2"),
        ('{"prompt": 3}', "prompt must be a text"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens a positive integer"),
        ('{"prompt": "a"', "line 1"),
    ],
)
def test_files_that_are_wrong_are_told(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(BenchError, match=message):
        FileSessions(file, Workload())


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be read"):
        FileSessions(tmp_path / "none.txt", Workload())


def draws(text: str, count: int = 4000) -> NDArray[np.int_]:
    lengths, random = Lengths.parse(text), np.random.default_rng(0)
    return np.array([lengths.draw(random) for _ in range(count)])


def test_a_number_is_that_number() -> None:
    assert set(draws("64").tolist()) == {64}


def test_a_range_is_uniform_with_both_ends() -> None:
    values, counts = np.unique(draws("16-19"), return_counts=True)
    assert values.tolist() == [16, 17, 18, 19]
    assert counts.min() > 900


@pytest.mark.parametrize(
    ("text", "median", "mean"),
    [
        ("normal:100,10", 100, 100),
        ("lognormal:100,0.5", 100, 100 * np.exp(0.125)),
        ("exponential:100", 100 * np.log(2), 100),
    ],
)
def test_named_distributions_have_their_medians_and_means(text: str, median: float, mean: float) -> None:
    drawn = draws(text, 20_000)
    assert np.median(drawn) == pytest.approx(median, rel=0.03)
    assert drawn.mean() == pytest.approx(mean, rel=0.03)


def test_no_length_is_below_one() -> None:
    assert draws("normal:1,50").min() == 1


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "x", "9-3", "0-4", "1.5", "normal:1", "normal:a,b", "zipf:2", "normal:1,2,3", "exponential:0"],
)
def test_everything_else_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(BenchError, match=r"give 64, 16-128"):
        Lengths.parse(text)
