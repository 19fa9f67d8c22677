"""What the simulated users ask, and how long it is: sessions, their lengths, and prompts from files."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.bench.endpoints import Endpoint, measure_ruler
from edge_phi3.bench.errors import BenchError
from edge_phi3.bench.workload import FileSessions, RandomSessions, Workload, parse_lengths
from tests.bench.conftest import RULER, client_of
from tests.support.cases import cases


def test_a_seed_asks_the_same_again_and_another_asks_something_else() -> None:
    workload = Workload(prompt_tokens="10-50", output_tokens="exponential:20", turns="1-3", seed=7)
    first, again = RandomSessions(workload, RULER), RandomSessions(workload, RULER)
    assert [first(i) for i in range(20)] == [again(i) for i in range(20)]
    assert first(0) != first(1)
    assert first(0).users != RandomSessions(Workload(prompt_tokens="10-50", seed=8), RULER)(0).users


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


def test_without_a_tokenizer_the_mean_length_of_words_is_measured() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/tokenize":
            return httpx.Response(404)
        usage = {"prompt_tokens": 2 * len(json.loads(request.content)["prompt"].split()), "completion_tokens": 1}
        events = {"choices": [{"text": "x"}]}, {"choices": [], "usage": usage}
        stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx.Response(200, content=stream + "data: [DONE]\n\n")

    ruler = asyncio.run(measure_ruler(Endpoint(client_of(answer), "openai", "m")))
    assert (ruler.tokens_per_word, ruler.exact) == (2, False)
    assert len(ruler.text(40, np.random.default_rng(0), first=True).split()) == 20
    refusing = Endpoint(client_of(lambda _: httpx.Response(404, content="no")), "chat")
    with pytest.raises(BenchError, match="/chat does not generate: HTTP 404: no"):
        asyncio.run(measure_ruler(refusing))


def test_prompts_from_a_file_are_all_asked_before_any_comes_again(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('plain text\n\n{"prompt": "short", "max_tokens": 3}\n{"prompt": "long"}\n', encoding="utf-8")
    sessions = FileSessions(file, Workload(output_tokens="9"))
    drawn = [sessions(number) for number in range(6)]
    asked = {(session.users[0], session.max_tokens[0]) for session in drawn[:3]}
    assert asked == {("plain text", 9), ("short", 3), ("long", 9)}
    assert [session.users for session in drawn[3:]] == [session.users for session in drawn[:3]]


@cases
def test_files_that_are_wrong_are_told(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(BenchError, match=message):
        FileSessions(file, Workload())


def draws(text: str) -> NDArray[np.int_]:
    draw, random = parse_lengths(text), np.random.default_rng(0)
    return np.array([draw(random) for _ in range(20_000)])


def test_a_range_is_uniform_with_both_ends_and_no_length_is_below_one() -> None:
    values, counts = np.unique(draws("16-19"), return_counts=True)
    assert values.tolist() == [16, 17, 18, 19]
    assert counts.min() > 4500
    assert set(draws("64").tolist()) == {64}
    assert draws("normal:1,50").min() == 1


@cases
def test_named_distributions_have_their_medians_and_means(text: str, median: float, mean: float) -> None:
    assert (np.median(draws(text)), draws(text).mean()) == pytest.approx((median, mean), rel=0.03)


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "9-3", "0-4", "1.5", "normal:1", "normal:a,b", "zipf:2", "normal:1,2,3", "exponential:0"]
)
def test_everything_else_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(BenchError, match=r"give 64, 16-128"):
        parse_lengths(text)
