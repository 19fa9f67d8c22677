"""docs/benchmarks.md: it is what the recorded results give, and it says nothing of what was not measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import engine_ratios, report, report_quants
from benchmarks.engine_ratios import Record, compare
from benchmarks.record import SUITES, read_pytest_benchmark
from benchmarks.report_tables import number, table
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.quant_report import Measurement, mean_divergence


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the recorded results."""
    return Path(shutil.copytree(report.RESULTS, tmp_path / "results"))


@pytest.fixture(scope="module")
def measurements() -> list[Measurement]:
    quants = report.quant_report()
    assert quants is not None
    return quants.measurements


def test_the_committed_page_and_plots_are_those_of_the_recorded_results() -> None:
    assert report.is_current() == [], "say `make report`"


def test_a_changed_figure_makes_page_and_plots_stale(results: Path) -> None:
    path = results / "quantizations.json"
    data = json.loads(path.read_text())
    data["measurements"][1]["speed"]["generated_per_second"] *= 2
    path.write_text(json.dumps(data))
    assert report.is_current(results) == [report.PAGE, *report.PLOTS]


@pytest.mark.parametrize("name", sorted(report.SHOWN & {path.name for path in report.RESULTS.iterdir()}))
def test_what_was_not_recorded_is_not_mentioned(results: Path, name: str) -> None:
    whole = report.render(results)
    (results / name).unlink()
    without = report.render(results)
    headings = [{line for line in text.splitlines() if line.startswith("## ")} for text in (whole, without)]
    assert headings[1] < headings[0]
    assert not any(word in without for word in ("None", "nan", "{", "}"))


def test_an_empty_folder_gives_the_introduction_alone(tmp_path: Path) -> None:
    text = report.render(tmp_path)
    assert text.startswith("# Benchmarks")
    assert "## " not in text


def test_the_engines_ratios_are_shown_and_folders_of_the_machine_are_not(results: Path) -> None:
    found = [
        compare("throughput", "18m", "4 clients, greedy", [(120.0, 100.0), (130.0, 100.0)], unit="tokens/s", goal=1.1),
        compare("throughput", "18m", "8 clients, greedy", [(90.0, 100.0)], unit="tokens/s", goal=1.2),
        compare("health", "18m", "p99", [(4.0, 8.0)], unit="ms", better="low"),
    ]
    command = ["--cache", "/somewhere/peers", "--rounds", "3", "--json=/somewhere/x.json"]
    path = results / "engine.json"
    path.unlink(missing_ok=True)
    for run in (found[:1], found):  # the second takes the place of the first
        engine_ratios.write(path, Record(Machine.here(), engine_ratios.public_options(command), run))
    text = report.render(results)
    assert "| throughput | 18m | 4 clients, greedy | 125 | 100 | tokens/s | 1.25 | 1.20 to 1.30 | 1.1 | yes |" in text
    assert "| throughput | 18m | 8 clients, greedy | 90 | 100 | tokens/s | 0.90 | 0.90 to 0.90 | 1.2 | no |" in text
    assert "1 of 2 goals are reached." in text
    assert "python -m benchmarks.engine_ratios --rounds 3`" in text
    assert "somewhere" not in text


def test_the_recommended_type_fits_and_nothing_that_fits_is_better(measurements: list[Measurement]) -> None:
    assert report_quants.PHI3_MINI_WEIGHTS == 3_821_079_552
    assert report_quants.KV_BYTES_PER_TOKEN == 384 * 1024
    chosen = []
    for budget in report_quants.BUDGETS:
        best = report_quants.choose(measurements, budget * 2**30)
        assert best is not None
        assert report_quants.needed_bytes(best.type) <= budget * 2**30
        for item in measurements:
            if mean_divergence(item) < mean_divergence(best):
                assert report_quants.needed_bytes(item.type) > budget * 2**30
        chosen.append(mean_divergence(best))
    assert chosen == sorted(chosen, reverse=True)
    assert report_quants.choose(measurements, 2**30) is None


def test_a_type_is_beaten_only_by_what_is_no_larger_and_clearly_better(measurements: list[Measurement]) -> None:
    quantised = [item for item in measurements if item.quality.divergence is not None]
    found = {item.type: report_quants.beaten_by(item, quantised) for item in quantised}
    assert any(better is not None for better in found.values())
    for item in quantised:
        if (better := found[item.type]) is not None:
            assert better.bytes <= item.bytes
            assert mean_divergence(better) < mean_divergence(item)
    smallest = min(quantised, key=lambda one: one.bytes)
    assert found[smallest.type] is None


def test_a_suites_figures_come_out_of_pytest_benchmarks_file() -> None:
    stats = {"median": 0.5, "min": 0.25, "rounds": 3, "max": 1.0}
    data = {"benchmarks": [{"name": "test_x", "stats": stats, "extra_info": {"case": "A case", "ratio": 2.0}}]}
    (entry,) = read_pytest_benchmark(data)
    assert (entry.name, entry.median, entry.least, entry.rounds) == ("A case", 0.5, 0.25, 3)
    assert entry.figures == {"ratio": 2.0}


def test_every_recorded_suite_exists() -> None:
    for suite in SUITES.values():
        assert (report.RESULTS.parent / f"test_{suite.name}.py").is_file()


def test_tables_and_figures() -> None:
    assert table(["a", "b"], [["x", "1"]]) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]
    assert [number(value) for value in (0, 12345.6, 123.4, 12.34, 0.001234, 0.00001234)] == [
        "0", "12,346", "123", "12.3", "0.00123", "1.2e-05",
    ]  # fmt: skip
