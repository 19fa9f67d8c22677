"""Simulated users: what they ask; closed and open loops, on an endpoint as slow as a test says; the figures."""

import asyncio
import functools
import itertools
import json
import selectors
import time
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.bench import BenchError, ExchangeError
from edge_phi3.bench.endpoints import Answer, Endpoint, measure_ruler
from edge_phi3.bench.load import Level, RequestRecord, per_token, poisson_arrivals, run_level, summarise
from edge_phi3.bench.workload import Ask, FileSessions, RandomSessions, Workload, parse_lengths
from tests.bench.conftest import RULER, client_of
from tests.support.cases import cases


class VirtualTime(asyncio.SelectorEventLoop):
    """Lets time pass when everybody waits: exact on any machine, and a minute passes in no time."""

    def __init__(self) -> None:
        self.now = 0.0
        waiting = selectors.SelectSelector()
        super().__init__(mock.Mock(wraps=waiting, select=functools.partial(self._select, waiting)))

    def _select(self, waiting: selectors.BaseSelector, timeout: float | None) -> list[Any]:
        ready = waiting.select(0)
        if not ready:
            assert timeout is not None, "everybody waits for ever"
            self.now += timeout
        return ready

    def time(self) -> float:
        return self.now


class Slow(Endpoint):
    """Answers with three pieces, `seconds` after the request; fails where the prompt says so."""

    def __init__(self, seconds: float, fail: str | None = None) -> None:
        super().__init__(client_of(lambda _: httpx.Response(500)), "chat")
        self.seconds = seconds
        self.fail = fail
        self.busy = self.most_busy = 0
        self.asked: list[Ask] = []
        self.times: list[float] = []

    async def generate(self, ask: Ask, answer: Answer) -> None:
        self.asked.append(ask)
        self.times.append(time.perf_counter())
        self.busy += 1
        self.most_busy = max(self.most_busy, self.busy)
        try:
            for _ in range(3):
                await asyncio.sleep(self.seconds / 3)
                answer.add(" piece")
            if self.fail and self.fail in ask.turns[-1]:
                raise ExchangeError("HTTP 500: it was told to fail")
        finally:
            self.busy -= 1
        answer.prompt_tokens, answer.completion_tokens = len("".join(ask.turns).split()), 3


def load(endpoint: Endpoint, level: Level, workload: Workload | None = None, **options: Any) -> list[RequestRecord]:
    """Run a level on an endpoint, in a time that passes while everybody waits."""
    sessions = RandomSessions(workload or Workload(prompt_tokens="5"), RULER)
    with (
        asyncio.Runner(loop_factory=VirtualTime) as runner,
        mock.patch.object(time, "perf_counter", runner.get_loop().time),
    ):
        return runner.run(run_level(endpoint, sessions, level, **options))[0]


def end(records: list[RequestRecord]) -> float:
    return max(record.started + record.latency for record in records)


def test_a_closed_loop_keeps_exactly_its_clients_busy_until_its_duration_ends_the_arrivals() -> None:
    endpoint = Slow(0.03)
    records = load(endpoint, Level(clients=4, sessions=12))
    assert endpoint.most_busy == 4
    assert len(records) == 12
    assert sorted(record.session for record in records) == list(range(12))
    assert end(records) == pytest.approx(3 * 0.03)
    for record in records:
        assert (record.first, record.latency) == pytest.approx((0.01, 0.03))
        assert record.gaps == pytest.approx([0.01, 0.01])
    endpoint = Slow(0.06)
    records = load(endpoint, Level(clients=2, duration=0.2))
    assert sorted(endpoint.times) == pytest.approx([0, 0, 0.06, 0.06, 0.12, 0.12, 0.18, 0.18])
    assert (len(records), endpoint.busy) == (8, 0), "it waits for the answers"
    assert end(records) == pytest.approx(0.24)


def test_an_open_loop_does_not_wait_for_answers_and_its_arrivals_are_a_poisson_process() -> None:
    endpoint = Slow(0.5)
    records = load(endpoint, Level(rate=200, sessions=60))
    arrivals = [*itertools.islice(poisson_arrivals(200, np.random.default_rng([Workload().seed, 0, 2])), 60)]
    assert endpoint.times == pytest.approx(arrivals)
    assert endpoint.most_busy == max(sum(0 <= time - other < 0.5 for other in arrivals) for time in arrivals) > 10
    assert end(records) == pytest.approx(arrivals[-1] + 0.5)
    times = np.fromiter(itertools.islice(poisson_arrivals(200, np.random.default_rng(1)), 20_001), float)
    gaps = np.diff(times) * 200
    assert times[0] == 0
    # An exponential distribution: mean, deviation and the share beyond the mean.
    assert [gaps.mean(), gaps.std(), (gaps > 1).mean()] == pytest.approx([1, 1, np.exp(-1)], rel=0.03)


def test_turns_carry_the_answers_and_a_failure_ends_its_session_and_nothing_else() -> None:
    endpoint, workload = Slow(0.0), Workload(prompt_tokens="4", turns="3")
    records = load(endpoint, Level(clients=1, sessions=1), workload)
    assert [(record.turn, record.prompt_tokens) for record in records] == [(0, 4), (1, 11), (2, 18)]
    first, answer, *rest = endpoint.asked[2].turns
    assert (first, answer, len(rest)) == (endpoint.asked[0].turns[0], " piece piece piece", 3)
    victim = RandomSessions(workload, RULER)(1).users[0]
    records = load(Slow(0.0, fail=victim), Level(clients=2, sessions=4), workload)
    failed = [(record.session, record.turn, record.error) for record in records if record.error]
    assert failed == [(1, 0, "HTTP 500: it was told to fail")]
    assert len(records) == 10


def test_warm_up_is_not_counted_and_asks_something_else() -> None:
    endpoint, seen = Slow(0.0), list[None]()
    records = load(endpoint, Level(clients=2, sessions=3, warmup=2), done=lambda: seen.append(None))
    assert len(records) == len(seen) == 3
    assert len({ask.turns[0] for ask in endpoint.asked}) == 5


def record(**changes: Any) -> RequestRecord:
    usual = RequestRecord(0, 0, 0.0, 2.0, 0.5, [0.5, 0.5, 0.5], 100, 4, counted=True, cached_tokens=50, error=None)
    return msgspec.structs.replace(usual, **changes)


def test_rates_are_over_the_whole_level_and_finished_requests() -> None:
    records = [record(), record(latency=4.0, completion_tokens=8), record(error="HTTP 429: full"), record(error="x")]
    summary = summarise(Level(clients=3), records, 0.2)
    assert (summary.clients, summary.requests, summary.failed) == (3, 2, 2)
    assert summary.errors == {"HTTP 429: full": 1, "x": 1}
    assert (summary.requests_per_second, summary.tokens_per_second) == (0.5, 3.0)
    assert (summary.total_tokens_per_second, summary.completion_tokens) == (53.0, 6.0)
    assert (summary.cached_share, summary.generator_cores) == pytest.approx((0.5, 0.05))


def test_percentiles_are_those_of_the_requests_and_time_per_token_leaves_the_first_out() -> None:
    summary = summarise(Level(clients=1), [record(latency=float(i), first=i / 10) for i in range(1, 101)], 0.0)
    expected = {"mean": 50.5, "p50": 50.5, "p90": 90.1, "p95": 95.05, "p99": 99.01, "max": 100.0}
    assert msgspec.to_builtins(summary.latency) == pytest.approx(expected)
    assert msgspec.to_builtins(summary.first_token) == pytest.approx({name: v / 10 for name, v in expected.items()})
    assert per_token(record()) == pytest.approx(0.5)
    assert per_token(record(completion_tokens=7)) == pytest.approx(0.25), "pieces of several tokens"
    assert per_token(record(completion_tokens=1, gaps=[])) is per_token(record(first=None)) is None


def test_what_a_server_does_not_tell_is_left_out() -> None:
    untold = record(prompt_tokens=None, cached_tokens=None, counted=False, first=None, gaps=[])
    summary = summarise(Level(rate=2.0), [untold], 0.0)
    assert (summary.prompt_tokens, summary.total_tokens_per_second, summary.cached_share) == (None, None, None)
    assert (summary.first_token, summary.per_token, summary.gap) == (None, None, None)
    assert (summary.counted, summary.rate) == (False, 2.0)
    # Where all failed there are no figures.
    summary = summarise(Level(clients=1), [record(error="HTTP 503")], 0.0)
    assert (summary.requests, summary.tokens_per_second, summary.latency) == (0, 0.0, None)


def test_a_seed_asks_the_same_again_and_lengths_turns_outputs_and_prefixes_follow_the_workload() -> None:
    workload = Workload(prompt_tokens="10-50", output_tokens="exponential:20", turns="1-3", seed=7)
    first, again = RandomSessions(workload, RULER), RandomSessions(workload, RULER)
    assert [first(i) for i in range(20)] == [again(i) for i in range(20)]
    assert first(0) != first(1)
    assert first(0).users != RandomSessions(Workload(prompt_tokens="10-50", seed=8), RULER)(0).users
    sessions = RandomSessions(Workload(prompt_tokens="40", output_tokens="5-9", turns="2-4"), RULER)
    drawn = [sessions(number) for number in range(200)]
    assert {len(text.split()) for session in drawn for text in session.users} == {40}
    assert {len(session.users) for session in drawn} == {2, 3, 4}
    assert {tokens for session in drawn for tokens in session.max_tokens} == {5, 6, 7, 8, 9}
    # Shared prefixes stand in front of the first turn only.
    sessions = RandomSessions(Workload(prompt_tokens="10", turns="2", shared_prefix=100, prefixes=3), RULER)
    users = [sessions(number).users for number in range(60)]
    assert {tuple(len(text.split()) for text in texts) for texts in users} == {(110, 10)}
    assert len({tuple(first.split()[:100]) for first, _ in users}) == 3
    assert len({first for first, _ in users}) == 60


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


@cases
def test_lengths_have_the_medians_and_means_of_their_distributions(text: str, median: float, mean: float) -> None:
    assert (np.median(draws(text)), draws(text).mean()) == pytest.approx((median, mean), rel=0.03)
    values, counts = np.unique(draws("16-19"), return_counts=True)
    assert values.tolist() == [16, 17, 18, 19], "a range is uniform with both ends"
    assert counts.min() > 4500
    assert (set(draws("64").tolist()), draws("normal:1,50").min()) == ({64}, 1)


@cases
def test_everything_else_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(BenchError, match=r"give 64, 16-128"):
        parse_lengths(text)
