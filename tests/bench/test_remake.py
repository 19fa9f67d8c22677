"""The command that measures the whole report again: a real part, a part that fails, and whose figures stay."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from benchmarks import remake, report
from benchmarks.engine_ratios import Record, compare
from benchmarks.record import SUITES
from benchmarks.remake import PARTS, Part, Remake, without_repeated
from edge_phi3.bench.machine import Machine


@pytest.fixture
def run(tmp_path: Path) -> Remake:
    """Parts that write into a folder of the test."""
    (tmp_path / "results").mkdir()
    return Remake(tmp_path / "results", tmp_path / "cache", None, Console(stderr=True))


def engine_record(command: str, *parts: str) -> Record:
    found = [compare(part, "18m", "a case", [(2.0, 1.0)], unit="tokens/s") for part in parts]
    return Record(Machine.here(), [command], found)


def test_one_part_is_measured_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    options = ["--only", "tokenizing", "--results", str(results), "--docs", str(docs), "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["remake", *options])
    assert remake.main() == 0
    said = capfd.readouterr().err
    assert re.search(r"^tokenizing: measured, \d+ s$", said, re.MULTILINE), said
    record = json.loads((results / "tokenizing.json").read_text())
    assert record["command"] == "python -m benchmarks.record tokenizing"
    assert all(entry["median"] > 0 and entry["figures"]["ratio"] > 0 for entry in record["results"])
    page = (docs / "benchmarks.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [f"## {SUITES['tokenizing'].title}"]
    assert report.is_current(results, docs) == []
    assert str(tmp_path) not in page


def test_a_part_that_fails_leaves_the_figures_before(
    run: Remake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tmp_path / "results" / "tokenizing.json"
    before.write_text("[]")
    broken = Part("broken", "benchmarks.record nonsense --output {output}", "tokenizing.json")
    outcome = run.run(broken)
    assert outcome.failed
    assert "exit code 2" in outcome.what
    assert before.read_text() == "[]"
    assert "nonsense is not a suite that is recorded" in capfd.readouterr().err

    before.unlink()
    others = [broken, Part("fine", "benchmarks.report --help", None)]
    monkeypatch.setattr(remake, "PARTS", others)
    monkeypatch.setattr(sys, "argv", ["remake", "--results", str(tmp_path / "results"), "--docs", str(tmp_path)])
    assert remake.main() == 1
    said = capfd.readouterr().err
    assert re.search(r"^ ?broken +\d+ +failed with exit code 2", said, re.MULTILINE), said
    assert re.search(r"^ ?fine +\d+ +done", said, re.MULTILINE), "it goes on after a failure"


def test_a_failure_halfway_through_the_engines_parts_is_not_taken_for_missed_goals(run: Remake, tmp_path: Path) -> None:
    made = tmp_path / "made.json"
    made.write_bytes(msgspec.json.encode([engine_record("new", "health")]))
    part = Part("engine", "", "engine.json")
    assert run._judge(part, 1, said="", made=made)[1]
    assert not (tmp_path / "results" / "engine.json").exists()
    assert run._judge(part, 1, said="a table", made=made) == ("measured; goals are missed", False)
    assert (tmp_path / "results" / "engine.json").exists()


def test_a_newer_comparison_replaces_the_same_of_any_older_command() -> None:
    old = [engine_record("a", "health", "throughput"), engine_record("b", "throughput")]
    new = [engine_record("c", "throughput")]
    (left,) = without_repeated(old, new)
    assert left.command == ["a"]
    assert [result.part for result in left.results] == ["health"]
    assert without_repeated(old, [engine_record("c", "health", "throughput")]) == []


def test_the_parts_make_every_file_that_the_page_knows() -> None:
    assert {part.file for part in PARTS} == report.SHOWN
