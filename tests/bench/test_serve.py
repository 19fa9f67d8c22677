"""`bench serve` on a real service: what is measured, and what is written."""

import asyncio
import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from edge_phi3.bench import BenchError
from edge_phi3.bench.load import Level
from edge_phi3.bench.serve import Report, ServeBench, measure
from edge_phi3.bench.workload import Workload
from tests.support.cases import cases
from tests.support.in_process import Running
from tests.test_cli import edge_phi3


def run(service: Running, *levels: Level, **workload: object) -> Report:
    bench = ServeBench(f"http://127.0.0.1:{service.port}", levels, Workload(**workload))  # type: ignore[arg-type] # tests
    return asyncio.run(measure(bench))


def bench(service: Running, *arguments: str) -> str:
    result = edge_phi3("bench", "serve", f"http://127.0.0.1:{service.port}", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_sweep_measures_what_the_service_itself_counts_and_refusals_alone_are_an_error(service: Running) -> None:
    before = service.service.pipeline.engine.stats()
    levels = Level(clients=1, sessions=2), Level(clients=3, sessions=6)
    report = run(service, *levels, prompt_tokens="12", output_tokens="5")
    after = service.service.pipeline.engine.stats()
    assert [(level.clients, level.requests, level.failed) for level in report.levels] == [(1, 2, 0), (3, 6, 0)]
    assert {level.prompt_tokens for level in report.levels} == {12.0}
    assert after.totals.generated - before.totals.generated == sum(
        record.completion_tokens for records in report.requests for record in records
    )
    for level in report.levels:
        assert level.latency is not None
        assert level.first_token is not None
        assert 0 < level.first_token.p50 < level.latency.p50
        assert level.tokens_per_second == pytest.approx(level.completion_tokens * level.requests_per_second)
    with pytest.raises(BenchError, match=r"No request to .* succeeded: HTTP 400"):
        run(service, Level(clients=1, sessions=1), output_tokens="1000000")


def test_a_shared_prefix_and_turns_reach_the_services_cache(service: Running) -> None:
    before = service.service.pipeline.engine.stats()
    level = Level(clients=1, sessions=3)
    report = run(service, level, prompt_tokens="8", output_tokens="4", shared_prefix=64, turns="2")
    assert report.exact_lengths
    assert {record.prompt_tokens for record in report.requests[0] if record.turn == 0} == {72}
    after = service.service.pipeline.engine.stats()
    # Of the three first turns two find the prefix, and each second turn finds its first turn's prompt.
    assert after.totals.cached - before.totals.cached >= 2 * 64 + 3 * 72


def test_the_command_prints_a_table_and_writes_every_file(service: Running, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "plot.svg")}
    options = ["--clients", "1,2", "--requests", "4", "--prompt-tokens", "6", "--output-tokens", "3"]
    options += [part for kind, path in files.items() for part in (f"--{kind.partition('.')[0]}", str(path))]
    rows = [line.split() for line in bench(service, *options).splitlines() if re.match(r"\s+\d+\s", line)]
    assert [row[:3] for row in rows] == [["1", "4", "0"], ["2", "4", "0"]]
    report = json.loads(files["json"].read_bytes())
    assert report["workload"]["prompt_tokens"] == "6"
    assert report["machine"]["cores"] >= 1
    assert [len(level) for level in report["requests"]] == [4, 4]
    with files["csv"].open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    for row, level in zip(written, report["levels"], strict=True):
        assert float(row["tokens_per_second"]) == level["tokens_per_second"]
        assert float(row["latency_p95"]) == level["latency"]["p95"]
    groups = {group.get("id") for group in ET.parse(files["plot.svg"]).iter("{http://www.w3.org/2000/svg}g")}
    assert {"axes_1", "axes_2", "legend_1"} <= groups
    # Real prompts, and whole answers.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a list?\nWhat is a tuple?\n", encoding="utf-8")
    options = ["--output-tokens", "2", "--no-stream", "--json", str(files["json"]), "--requests", "2"]
    bench(service, "--prompts", str(prompts), *options)
    level = json.loads(files["json"].read_bytes())["levels"][0]
    assert (level["requests"], level["first_token"], level["completion_tokens"]) == (2, None, 2.0)


@cases
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    result = edge_phi3("bench", "serve", "http://127.0.0.1:9", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
