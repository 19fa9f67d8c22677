"""The project's own benches: the committed page is what the results give, and benchmarks/gpu runs whole on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import tables

ROOT = Path(__file__).resolve().parents[2]
REPORT, MEASURE = ((sys.executable, "-m", f"benchmarks.{name}") for name in ("report", "measure"))
GPU = ROOT / "benchmarks" / "gpu" / "run.sh"
TINY = (GPU, "--cpu", "--small", "--threads", "1", "--rounds", "1")
UNFINISHED = 75


def run(*command: str | Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program, which must end with `code`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env = own | {"PYTHON": sys.executable} | environment
    finished = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert finished.returncode == code, finished.stderr[-3000:]
    return finished


def headings(page: Path) -> list[str]:
    return [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str | Path, ...]:
    """Options for a copy of the recorded results and of the page."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return "--results", tmp_path / "results", "--docs", tmp_path / "docs"


def test_what_changed_makes_page_and_plots_stale_and_is_shown(folders: tuple[str | Path, ...], tmp_path: Path) -> None:
    assert run(*REPORT, "--check").stdout == "Up to date.\n", "page and plots are those of the recorded results"
    path = tmp_path / "results" / "quantizations.json"
    data = json.loads(path.read_text())
    data["measurements"][1]["speed"]["generated_per_second"] *= 2
    path.write_text(json.dumps(data))
    stale = run(*REPORT, "--check", *folders, code=1).stdout
    assert stale.endswith("benchmarks.md, quantizations-quality.svg, quantizations-speed.svg\n")
    result = tables(__file__)["RESULT"]
    machine = json.loads((tmp_path / "results" / "transformers.json").read_text())["machine"]
    (tmp_path / "results" / "engine.json").write_text(json.dumps({"machine": machine, "results": [result]}))
    run(*REPORT, *folders)
    run(*REPORT, "--check", *folders)
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| throughput | 0.65b | 4 clients, greedy | 125 | 100 | tokens/s | 1.25 | 1.20 to 1.30 |" in text


def test_what_is_measured_is_on_the_page_and_a_part_that_fails_leaves_its_figures(
    folders: tuple[str | Path, ...], tmp_path: Path
) -> None:
    results, page = tmp_path / "results", tmp_path / "docs" / "benchmarks.md"
    kept = results / "prefix_cache.json"
    for path in {*results.iterdir()} - {kept}:
        path.unlink()
    before, parts = kept.read_text(), ("--only", "prefix_cache", "--only", "tokenizing")
    finished = run(*MEASURE, *parts, *folders, code=1, PYTEST_ADDOPTS="-k question")  # which one part has nothing of
    outcomes = " ".join(finished.stderr.rpartition("outcome")[2].split())
    assert "failed with exit code 5; the figures before stay" in outcomes
    assert outcomes.count("measured") == 1
    assert kept.read_text() == before
    record = json.loads((results / "tokenizing.json").read_text())
    assert all(entry["median"] > 0 and entry["figures"]["ratio"] > 0 for entry in record["results"])
    assert headings(page) == ["## The prefix cache", "## Text to tokens and back"]
    run(*REPORT, "--check", *folders)
    assert str(tmp_path) not in page.read_text()
    for path in results.iterdir():
        path.unlink()
    run(*REPORT, *folders)
    assert headings(page) == [], "what was not recorded is not mentioned"


@pytest.fixture(scope="module", params=["nowhere", pytest.param("", marks=pytest.mark.soak)])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of benchmarks/gpu: without llama.cpp's programs, or with those that were built."""
    folder = tmp_path_factory.mktemp("gpu") / "report"
    run(*TINY, "--out", folder, *(["--peers", request.param] if request.param else []))
    return folder


def test_every_part_of_the_gpu_run_runs_on_the_cpu(out: Path) -> None:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    steps, kinds, variants = report["steps"], ("Q4_K_M", "Q8_0", "F16"), ("4k", "128k")
    assert {name.partition(".")[0] for name in steps} == {"build", "models", "exactness", "speed"}
    assert not [step for step in steps.values() if step["failure"]]
    assert report["gpu"] is None
    # Answers in F32 are those of transformers.
    exact = steps["exactness.f32"]["result"]
    assert exact["asked"] >= 12
    assert exact["different"] == exact["scores_apart"] == {}
    for variant in variants:
        sizes = [steps[f"models.{variant}.{kind}"]["result"]["bytes"] for kind in kinds]
        assert sizes == sorted(set(sizes)), "fewer bits, a smaller file"
        assert steps[f"speed.long-prompt.{variant}"]["result"]["ours"] > 0
    rows = report["throughput"]
    assert {(row["kind"], row["clients"]) for row in rows} == {("Q4_K_M", 1), ("Q4_K_M", 8)}
    assert all(row["ours"] > 0 for row in rows)
    if steps["speed.stream.Q4_K_M"]["missing"] == "llama-server is not there":
        assert {row["theirs"] for row in rows} == {None}
    text = (out / "report.md").read_text()
    assert {"## Exactness", "## Tokens per second", "## Models"} <= set(text.splitlines())
    gaps = [step["name"] for step in steps.values() if step["missing"]]
    assert "speed.memory.four-f16" in gaps
    assert all(f"| {name} |" in text for name in gaps)


def test_only_what_failed_or_was_missing_is_done_again(out: Path) -> None:
    steps = out / "work" / "steps"
    failed = steps / "models.4k.F16.json"
    failed.write_text('{"name": "models.4k.F16", "seconds": 1.0, "failure": "ValueError: broken"}')
    before = {path: path.stat().st_mtime_ns for path in steps.iterdir()}
    run(*TINY, "--out", out, "--part", "models", "--part", "exactness", "--part", "report")
    assert [path for path in before if path.stat().st_mtime_ns != before[path]] == [failed]
    assert json.loads(failed.read_text())["failure"] is None


def test_wrong_usage_is_told(out: Path, tmp_path: Path) -> None:
    bundle, gpu = tmp_path / "vax", (GPU, "--out", tmp_path / "report")
    bundle.mkdir()
    (bundle / "bundle.json").write_text('{"python": "2.7", "machine": "vax"}')
    cases: list[tuple[tuple[str | Path, ...], int, str]] = [
        (gpu, 2, "without a GPU, say --cpu"),
        ((*gpu, "--cpu", "--limit", "0"), 2, "--limit must be positive"),
        ((*gpu, "--bundle", tmp_path), 2, "it has no bundle.json"),
        ((*gpu, "--bundle", bundle), 1, "is for Python 2.7 on vax"),
        ((GPU, "--cpu", "--out", out, "--part", "report"), 1, "give another folder"),
        ((*TINY, *gpu[1:], "--limit", "0.000001", "--part", "models"), UNFINISHED, "Run the same command again."),
        ((*MEASURE, "--only", "nonsense"), 2, "invalid choice: 'nonsense'"),
    ]
    for command, code, words in cases:
        assert words in run(*command, code=code).stderr
    assert (tmp_path / "report" / "report.md").exists(), "the time limit ended a run in good order"


def test_the_scripts_are_sound_and_the_run_starts_before_the_bindings_have_their_libraries() -> None:
    run(sys.executable, "-c", "import sys; sys.modules['llama_cpp'] = None; import benchmarks.gpu.run")
    for script in (GPU, GPU.with_name("prepare.sh")):
        assert os.access(script, os.X_OK)
        run("bash", "-n", script)
        assert "set -euo pipefail" in script.read_text()
        if shellcheck := shutil.which("shellcheck"):
            run(shellcheck, script)
