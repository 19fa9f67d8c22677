"""benchmarks/gpu: the whole run on the CPU with a tiny model, its steps, its goals, and what goes into a bundle."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from benchmarks.gpu import bootstrap, bundle
from benchmarks.gpu.device import cpu_bandwidth
from benchmarks.gpu.figures import throughput
from benchmarks.gpu.goals import GOALS, judge
from benchmarks.gpu.options import PARTS, UNFINISHED, parse
from benchmarks.gpu.steps import NotMeasured, OutOfTime, Record, Steps

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(RUN), "--cpu", "--small", "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "report"
    finished = call("--out", folder, "--rounds", "1")
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_every_part_runs_on_the_cpu(report: dict[str, Any]) -> None:
    assert {name.partition(".")[0] for name in report["steps"]} == set(PARTS) - {"report"}
    assert not [step for step in report["steps"].values() if step["failure"]]


def test_f32_answers_are_those_of_transformers(report: dict[str, Any]) -> None:
    found = report["steps"]["exactness.f32"]["result"]
    assert found["asked"] >= 12
    assert found["different"] == found["scores_apart"] == {}
    (verdict,) = [each for each in report["goals"] if "F32" in each["goal"]]
    assert verdict["met"] == "met"


def test_no_goal_of_a_gpu_is_met_or_missed_on_a_cpu(report: dict[str, Any]) -> None:
    assert report["gpu"] is None
    verdicts = {each["goal"]: each["met"] for each in report["goals"]}
    assert len(verdicts) == len(GOALS)
    assert {verdicts[goal.name] for goal in GOALS if goal.gpu_only} == {"not measured"}


def test_models_are_smaller_the_fewer_bits_they_have(report: dict[str, Any]) -> None:
    for variant in ("4k", "128k"):
        sizes = [report["steps"][f"models.{variant}.{kind}"]["result"]["bytes"] for kind in ("Q4_K_M", "Q8_0", "F16")]
        assert sizes == sorted(set(sizes))


def test_throughput_of_every_type(report: dict[str, Any]) -> None:
    rows = report["throughput"]
    assert {(row["kind"], row["clients"]) for row in rows} == {
        (k, c) for k in ("Q4_K_M", "Q8_0", "F16") for c in (1, 8)
    }
    assert all(row["ours"] > 0 and row["share"] > 0 for row in rows)
    compared = [row["theirs"] for row in rows]
    if any(value is None for value in compared):
        assert compared == [None] * len(rows)
        assert report["steps"]["speed.stream.Q4_K_M"]["missing"] == "llama-server is not there"


def test_time_to_the_first_token_of_long_prompts(report: dict[str, Any]) -> None:
    found = {name: step["result"] for name, step in report["steps"].items() if name.startswith("speed.long-prompt.")}
    assert {result["variant"] for result in found.values()} == {"4k", "128k"}
    assert all(result["ours"] > 0 for result in found.values())


def test_parts_of_a_step_add_up(report: dict[str, Any]) -> None:
    splits = report["steps"]["profile.step"]["result"]["splits"]
    assert {split["rows"] for split in splits} == {1, 8}
    for split in splits:
        # Of the sixteen tokens of each request, as many as there are steps in which nobody has ended yet.
        assert split["steps"] >= 15
        assert min(split["decode"], split["choose"]) > 0
        assert split["step"] == pytest.approx(split["decode"] + split["choose"] + split["rest"])


def test_the_graph_chooses_the_tokens_that_numpy_chooses(report: dict[str, Any]) -> None:
    rows = report["steps"]["profile.sampling"]["result"]["rows"]
    assert {row["same_tokens"] for row in rows if row["mode"] == "greedy"} == {True}


def test_the_report_for_people_has_every_goal_and_every_gap(out: Path, report: dict[str, Any]) -> None:
    text = (out / "report.md").read_text()
    assert all(goal.name in text for goal in GOALS)
    gaps = [step["name"] for step in report["steps"].values() if step["missing"]]
    assert "speed.memory.four-f16" in gaps
    assert all(f"| {name} |" in text for name in gaps)


def test_what_is_done_is_not_done_again(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (out / "work" / "steps").iterdir()}
    finished = call("--out", out, "--rounds", "1", "--part", "models", "--part", "exactness", "--part", "report")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_of_another_kind_is_refused(out: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(RUN), "--cpu", "--out", str(out), "--part", "report"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "give another folder" in finished.stderr


def test_the_time_limit_ends_a_run_in_good_order(tmp_path: Path) -> None:
    finished = call("--out", tmp_path / "report", "--limit", "0.000001", "--part", "models")
    assert finished.returncode == UNFINISHED
    assert "Run the same command again." in finished.stderr
    assert (tmp_path / "report" / "report.md").exists()


def test_steps_keep_results_and_try_failures_again(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("broken")

    def lack() -> None:
        raise NotMeasured("no tool")

    steps = Steps(tmp_path, 60)
    assert steps.run("a.done", lambda: {"x": 1}) == {"x": 1}
    assert steps.run("a.failed", fail) is None
    assert steps.run("a.missing", lack) is None
    assert steps.failed == ["a.failed"]
    again = Steps(tmp_path, 60)
    assert again.run("a.done", lambda: {"x": 2}) == {"x": 1}
    assert again.run("a.failed", lambda: {"x": 3}) == {"x": 3}
    assert again.run("a.missing", lambda: {"x": 4}) == {"x": 4}
    assert again.failed == []


def test_no_step_begins_past_the_limit(tmp_path: Path) -> None:
    with pytest.raises(OutOfTime):
        Steps(tmp_path, -1).run("a.b", lambda: 1)
    assert Steps(tmp_path, -1).records() == {}


def test_no_step_begins_that_would_pass_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.long.json").write_text('{"name": "a.long", "seconds": 100}')
    steps = Steps(tmp_path, 60)
    assert steps.run("a.first", lambda: 1) == 1  # each run moves on by one step at least
    assert steps.run("b.other", lambda: 2) == 2
    with pytest.raises(OutOfTime):
        steps.run("a.second", lambda: 3)


def test_a_bundle_for_another_python_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"python": "2.7", "machine": "vax"}')
    with pytest.raises(SystemExit, match=r"is for Python 2\.7 on vax"):
        bootstrap.environment_of_bundle(tmp_path, tmp_path / "work", sys.executable)


def records_of(*ratios: float, memory: float = 9e9) -> dict[str, Record]:
    """Give records as a GPU could leave them: one type, 8 clients, a turn for each ratio."""
    traffic = {"weights": 2_000_000_000, "kv_per_token": 400_000}
    found = {
        "speed.bandwidth": {"read": 5e11, "copy": 4e11},
        "speed.memory.four-f16": {"ours": memory},
        "exactness.f32": {"asked": 9, "different": {"greedy 3": "[1] instead of [2]"}},
    }
    for number, ratio in enumerate(ratios, 1):
        level = {"mode": "greedy", "clients": 8, "ours": 100 * ratio, "theirs": 100.0, "ratio": ratio}
        found[f"speed.throughput.Q4_K_M.{number}"] = {
            "kind": "Q4_K_M", "levels": [level], "tokens": 64, "traffic": traffic, "peer_missing": None
        }  # fmt: skip
    return {name: Record(name=name, seconds=1.0, result=result) for name, result in found.items()}


def test_goals_are_judged_by_the_median_of_the_turns() -> None:
    def verdict(*ratios: float) -> str:
        return next(v.met for v in judge(records_of(*ratios), gpu=True) if "llama-server" in v.goal)

    assert verdict(0.5, 1.2, 1.3) == "met"
    assert verdict(1.0, 1.0, 1.3) == "not met"
    assert verdict() == "not measured"


def test_goals_say_what_was_missed_and_what_was_not_measured() -> None:
    verdicts = {each.goal: each for each in judge(records_of(1.2, memory=10e9), gpu=True)}
    met = {goal.name: verdicts[goal.name].met for goal in GOALS}
    assert [name for name, each in met.items() if each == "not met"] == [GOALS[0].name, GOALS[4].name]
    assert verdicts[GOALS[3].name].met == "not measured"
    assert "has not been run" in verdicts[GOALS[3].name].note


def test_share_of_the_memory_limit_counts_weights_and_cache() -> None:
    (row,) = throughput(records_of(1.0))
    assert row.share == pytest.approx(100 / 8 * (2e9 + 8 * 400_000 * 96) / 5e11)


def test_bandwidth_is_measured() -> None:
    found = cpu_bandwidth(1 << 20, repeats=2)
    assert found.limit == found.copy > 0


def test_wrong_usage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--out", "x"],
        ["--out", "x", "--cpu", "--limit", "0"],
        ["--out", "x", "--bundle", str(tmp_path)],
    ):
        with pytest.raises(SystemExit) as ended:
            parse(arguments)
        assert ended.value.code == 2
    assert "bundle.json" in capsys.readouterr().err


NEEDED = (
    "CMakeLists.txt",
    "llama_cpp/llama_cpp.py",
    "vendor/llama.cpp/CMakeLists.txt",
    "vendor/llama.cpp/ggml/src/ggml.c",
    "vendor/llama.cpp/ggml/src/ggml-backend.cpp",
    "vendor/llama.cpp/ggml/src/ggml-cuda/ggml-cuda.cu",
    "vendor/llama.cpp/ggml/src/ggml-cuda/template-instances/mmq-instance-q4_k.cu",
    "vendor/llama.cpp/ggml/src/ggml-cpu/arch/x86/quants.c",
    "vendor/llama.cpp/scripts/ui-assets.cmake",
    "vendor/llama.cpp/tools/server/server.cpp",
    "vendor/llama.cpp/tools/ui/CMakeLists.txt",
    "vendor/llama.cpp/vendor/cpp-httplib/LICENSE",
)
NOT_NEEDED = (
    ".git/config",
    "docs/index.md",
    "vendor/llama.cpp/docs/build.md",
    "vendor/llama.cpp/ggml/src/ggml-vulkan/ggml-vulkan.cpp",
    "vendor/llama.cpp/models/ggml-vocab-phi-3.gguf",
    "vendor/llama.cpp/scripts/sync.sh",
    "vendor/llama.cpp/tests/test-backend-ops.cpp",
    "vendor/llama.cpp/tools/mtmd/test-1.jpeg",
    "vendor/llama.cpp/tools/server/tests/unit.py",
    "vendor/llama.cpp/tools/ui/src/app.html",
)


def test_source_is_stripped_of_what_is_not_built(tmp_path: Path) -> None:
    package = tmp_path / "llama_cpp_python-1.2.3.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        for name in (*NEEDED, *NOT_NEEDED):
            member = tarfile.TarInfo(f"llama_cpp_python-1.2.3/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    before, after = bundle.strip_source(package, tmp_path)
    assert before == sum(map(len, (*NEEDED, *NOT_NEEDED)))
    assert after == sum(map(len, NEEDED))
    with tarfile.open(tmp_path / "llama_cpp_python-1.2.3.tar.xz") as archive:
        kept = {PurePosixPath(member.name).relative_to("llama_cpp_python-1.2.3").as_posix() for member in archive}
    assert kept == set(NEEDED)


def test_a_wheel_is_thinned_with_its_record(tmp_path: Path) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    names = ("a/data/bin/a", "a/data/bin/b", "a-1.dist-info/RECORD")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "".join(f"{each},,\n" for each in names) if name.endswith("RECORD") else "x")
    bundle.thin_wheel(wheel, re.compile("a/data/bin/b"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == [names[0], names[2]]
        assert archive.read(names[2]).decode() == f"{names[0]},,\n{names[2]},,\n"


def test_a_bundle_asks_for_all_that_runs_but_the_bindings() -> None:
    wanted = bundle.requirements()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) - set(wanted) == {
        text for text in project["dependencies"] if text.startswith("llama-cpp-python")
    }


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
