"""The bench's own commands: the committed page is what the results give, and a part is measured, or left as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def headings(page: Path) -> list[str]:
    return [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str | Path, ...]:
    """Options for a copy of the recorded results and of the page."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return "--results", tmp_path / "results", "--docs", tmp_path / "docs"


def test_the_committed_page_and_plots_are_those_of_the_recorded_results() -> None:
    finished = run("report", "--check")
    assert (finished.returncode, finished.stdout) == (0, "Up to date.\n")


def test_a_changed_figure_makes_page_and_plots_stale(folders: tuple[str | Path, ...], tmp_path: Path) -> None:
    path = tmp_path / "results" / "quantizations.json"
    data = json.loads(path.read_text())
    data["measurements"][1]["speed"]["generated_per_second"] *= 2
    path.write_text(json.dumps(data))
    finished = run("report", "--check", *folders)
    assert finished.returncode == 1
    assert finished.stdout.endswith("benchmarks.md, quantizations-quality.svg, quantizations-speed.svg\n")
    assert run("report", *folders).returncode == 0
    assert run("report", "--check", *folders).returncode == 0


def test_what_was_not_recorded_is_not_mentioned(folders: tuple[str | Path, ...], tmp_path: Path) -> None:
    page, kept = tmp_path / "docs" / "benchmarks.md", tmp_path / "results" / "prefix_cache.json"
    before = headings(page)
    for path in sorted((tmp_path / "results").iterdir()):
        if path != kept:
            path.unlink()
    assert run("report", *folders).returncode == 0
    assert headings(page) == ["## The prefix cache"] != before
    kept.unlink()
    assert run("report", *folders).returncode == 0
    assert headings(page) == []


def test_the_engines_ratios_are_shown(folders: tuple[str | Path, ...], tmp_path: Path) -> None:
    machine = json.loads((tmp_path / "results" / "transformers.json").read_text())["machine"]
    result = {
        "part": "throughput", "model": "0.65b", "case": "4 clients, greedy", "ours": 125.0, "theirs": 100.0,
        "unit": "tokens/s", "ratio": 1.25, "low": 1.2, "high": 1.3, "load": 0.1,
        "turns": [[120.0, 100.0], [130.0, 100.0]],
    }  # fmt: skip
    (tmp_path / "results" / "engine.json").write_text(json.dumps({"machine": machine, "results": [result]}))
    assert run("report", *folders).returncode == 0
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| throughput | 0.65b | 4 clients, greedy | 125 | 100 | tokens/s | 1.25 | 1.20 to 1.30 |" in text


def test_one_part_is_measured_and_the_page_says_so(tmp_path: Path) -> None:
    folders = ("--results", tmp_path / "results", "--docs", tmp_path)
    finished = run("measure", "--only", "tokenizing", *folders)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "tokenizing" in finished.stderr
    record = json.loads((tmp_path / "results" / "tokenizing.json").read_text())
    assert all(entry["median"] > 0 and entry["figures"]["ratio"] > 0 for entry in record["results"])
    assert headings(tmp_path / "benchmarks.md") == ["## Text to tokens and back"]
    assert run("report", "--check", *folders).returncode == 0
    assert str(tmp_path) not in (tmp_path / "benchmarks.md").read_text()


def test_a_part_that_fails_leaves_the_figures_before_and_others_go_on(
    folders: tuple[str | Path, ...], tmp_path: Path
) -> None:
    path = tmp_path / "results" / "prefix_cache.json"
    before = path.read_text()
    parts = ("--only", "prefix_cache", "--only", "memory")
    finished = run("measure", *parts, *folders, PYTEST_ADDOPTS="--no-such-option")
    assert finished.returncode == 1
    assert path.read_text() == before
    outcomes = " ".join(finished.stderr.rpartition("outcome")[2].split())
    assert "failed with exit code 4; the figures before stay" in outcomes
    assert outcomes.startswith("memory")
    assert outcomes.count("measured") == 1


def test_an_unknown_part_is_refused() -> None:
    finished = run("measure", "--only", "nonsense")
    assert finished.returncode == 2
    assert "invalid choice: 'nonsense'" in finished.stderr
