"""bench serve against wrk: what is compared, when the two agree, and a real turn of both where wrk is installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.request_rate import Case, Record, Turn, compare, show, write_inputs
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.workload import Workload
from tests.api.conftest import Running


def case(bench: list[float], wrk: list[float]) -> Case:
    return Case(tokens=4, bench=[Turn(rate, 0.1) for rate in bench], wrk=[Turn(rate, 0.02) for rate in wrk])


@pytest.mark.parametrize(
    ("bench", "wrk", "verdict"),
    [
        ([95, 100, 105], [100, 101, 102], "yes"),
        ([99, 100, 101], [108, 110, 112], "no"),
        ([80, 100, 110], [100, 101, 102], "too noisy to tell"),
        ([100, 100, 100], [100, 100, 100], "yes"),
    ],
)
def test_tools_agree_when_their_medians_are_no_further_apart_than_their_turns(
    bench: list[float], wrk: list[float], verdict: str
) -> None:
    assert case(bench, wrk).verdict == verdict


def test_the_report_shows_the_ratio_and_the_verdict(tmp_path: Path) -> None:
    found = case([95, 100, 105], [98, 99, 101])
    record = Record(machine=Machine.here(), command="a command", clients=4, seconds=5, cases=[found])
    text = report._request_rate(record)
    assert "| 4 | 100 | 99 | 1.010 | 10.0 % | yes | 0.100 | 0.020 |" in text
    assert "a closed loop of 4 clients" in text


def test_wrk_sends_the_body_that_bench_serve_sends(tmp_path: Path) -> None:
    prompts, _, body = write_inputs(tmp_path, Workload(output_tokens="4", stream=False, ignore_eos=True))
    sent = json.loads(body.read_bytes())
    assert sent["prompt"] == prompts.read_text()
    assert sent["stream"] is False
    assert sent["generate_kwargs"] == {
        "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True,
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_both_tools_measure_a_real_service(service: Running) -> None:
    found = compare(f"http://127.0.0.1:{service.port}", 2, clients=2, seconds=1, rounds=1)
    assert found.ratio > 0
    assert len(found.bench) == len(found.wrk) == 1
    assert show([found]).row_count == 2
