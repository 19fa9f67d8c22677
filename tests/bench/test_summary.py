"""The figures of a level, from records whose figures are known."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_phi3.bench.load import Level, RequestRecord
from edge_phi3.bench.summary import per_token, summarise


def record(**changes: Any) -> RequestRecord:
    usual = RequestRecord(0, 0, 0.0, 2.0, 0.5, [0.5, 0.5, 0.5], 100, 4, counted=True, cached_tokens=50, error=None)
    return msgspec.structs.replace(usual, **changes)


def test_rates_are_over_the_whole_level_and_finished_requests() -> None:
    records = [record(), record(latency=4.0, completion_tokens=8), record(error="HTTP 429: full"), record(error="x")]
    summary = summarise(Level(clients=3), records, 0.2)
    assert (summary.clients, summary.requests, summary.failed) == (3, 2, 2)
    assert summary.errors == {"HTTP 429: full": 1, "x": 1}
    assert summary.requests_per_second == 0.5
    assert summary.tokens_per_second == 3.0
    assert summary.total_tokens_per_second == 53.0
    assert summary.completion_tokens == 6.0
    assert summary.cached_share == 0.5
    assert summary.generator_cores == pytest.approx(0.05)


def test_percentiles_are_those_of_the_requests() -> None:
    records = [record(latency=float(i), first=i / 10) for i in range(1, 101)]
    latency, first = (summary := summarise(Level(clients=1), records, 0.0)).latency, summary.first_token
    assert latency is not None
    assert first is not None
    assert (latency.p50, latency.mean, latency.max) == (50.5, 50.5, 100.0)
    assert latency.p95 == pytest.approx(95.05)
    assert latency.p99 == pytest.approx(99.01)
    assert first.p90 == pytest.approx(9.01)


def test_time_per_token_leaves_the_first_token_out() -> None:
    assert per_token(record()) == pytest.approx(0.5)
    assert per_token(record(completion_tokens=7)) == pytest.approx(0.25), "pieces of several tokens"
    assert per_token(record(completion_tokens=1, gaps=[])) is None
    assert per_token(record(first=None)) is None


def test_what_a_server_does_not_tell_is_left_out() -> None:
    records = [record(prompt_tokens=None, cached_tokens=None, counted=False, first=None, gaps=[])]
    summary = summarise(Level(rate=2.0), records, 0.0)
    assert (summary.prompt_tokens, summary.total_tokens_per_second, summary.cached_share) == (None, None, None)
    assert (summary.first_token, summary.per_token, summary.gap) == (None, None, None)
    assert not summary.counted
    assert summary.rate == 2.0


def test_a_level_where_all_failed_has_no_figures() -> None:
    summary = summarise(Level(clients=1), [record(error="HTTP 503")], 0.0)
    assert (summary.requests, summary.tokens_per_second, summary.latency) == (0, 0.0, None)
