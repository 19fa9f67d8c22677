"""benchmarks/gpu: the whole run on the CPU with a tiny model, and what its commands refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"
TINY = ("--cpu", "--small", "--threads", "1", "--rounds", "1")
PARTS = {"build", "models", "exactness", "speed"}
UNFINISHED = 75


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(RUN), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "report"
    finished = call(*TINY, "--out", folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_every_part_runs_on_the_cpu(report: dict[str, Any]) -> None:
    assert {name.partition(".")[0] for name in report["steps"]} == PARTS
    assert not [step for step in report["steps"].values() if step["failure"]]
    assert report["gpu"] is None


def test_f32_answers_are_those_of_transformers(report: dict[str, Any]) -> None:
    found = report["steps"]["exactness.f32"]["result"]
    assert found["asked"] >= 12
    assert found["different"] == found["scores_apart"] == {}


def test_models_are_smaller_the_fewer_bits_they_have(report: dict[str, Any]) -> None:
    for variant in ("4k", "128k"):
        sizes = [report["steps"][f"models.{variant}.{kind}"]["result"]["bytes"] for kind in ("Q4_K_M", "Q8_0", "F16")]
        assert sizes == sorted(set(sizes))


def test_speed_is_measured_and_compared_where_there_is_a_peer(report: dict[str, Any]) -> None:
    rows = report["throughput"]
    assert {(row["kind"], row["clients"]) for row in rows} == {
        (kind, clients) for kind in ("Q4_K_M", "Q8_0", "F16") for clients in (1, 8)
    }
    assert all(row["ours"] > 0 for row in rows)
    if any(row["theirs"] is None for row in rows):
        assert {row["theirs"] for row in rows} == {None}
        assert report["steps"]["speed.stream.Q4_K_M"]["missing"] == "llama-server is not there"
    for variant in ("4k", "128k"):
        assert report["steps"][f"speed.long-prompt.{variant}"]["result"]["ours"] > 0


def test_the_report_for_people_has_every_gap(out: Path, report: dict[str, Any]) -> None:
    text = (out / "report.md").read_text()
    assert {"## Exactness", "## Tokens per second", "## Models"} <= set(text.splitlines())
    gaps = [step["name"] for step in report["steps"].values() if step["missing"]]
    assert "speed.memory.four-f16" in gaps
    assert all(f"| {name} |" in text for name in gaps)


def test_only_what_failed_or_was_missing_is_done_again(out: Path) -> None:
    steps = out / "work" / "steps"
    failed = steps / "models.4k.F16.json"
    failed.write_text('{"name": "models.4k.F16", "seconds": 1.0, "failure": "ValueError: broken"}')
    before = {path: path.stat().st_mtime_ns for path in steps.iterdir()}
    finished = call(*TINY, "--out", out, "--part", "models", "--part", "exactness", "--part", "report")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [failed]
    assert json.loads(failed.read_text())["failure"] is None


def test_a_run_of_another_kind_is_refused(out: Path) -> None:
    finished = call("--cpu", "--out", out, "--part", "report")
    assert finished.returncode == 1
    assert "give another folder" in finished.stderr


def test_the_time_limit_ends_a_run_in_good_order(tmp_path: Path) -> None:
    finished = call(*TINY, "--out", tmp_path / "report", "--limit", "0.000001", "--part", "models")
    assert finished.returncode == UNFINISHED
    assert "Run the same command again." in finished.stderr
    assert (tmp_path / "report" / "report.md").exists()


def test_wrong_usage_is_told(tmp_path: Path) -> None:
    for arguments, words in {
        (): "without a GPU, say --cpu",
        ("--cpu", "--limit", "0"): "--limit must be positive",
        ("--bundle", tmp_path): "it has no bundle.json",
    }.items():
        finished = call("--out", tmp_path / "report", *arguments)
        assert finished.returncode == 2
        assert words in finished.stderr


def test_a_bundle_for_another_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"python": "2.7", "machine": "vax"}')
    finished = call("--out", tmp_path / "report", "--bundle", tmp_path)
    assert finished.returncode == 1
    assert "is for Python 2.7 on vax" in finished.stderr


def test_the_run_starts_before_the_bindings_have_their_libraries() -> None:
    code = "import sys; sys.modules['llama_cpp'] = None; import benchmarks.gpu.run"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_the_scripts_are_sound() -> None:
    for script in (RUN, RUN.with_name("prepare.sh")):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)
        assert "set -euo pipefail" in script.read_text()
        if shellcheck := shutil.which("shellcheck"):
            subprocess.run([shellcheck, script], check=True)
