"""The part "profile": the time of a decode step by where it goes, GPU kernels, and choosing tokens on the GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.gpu.checkpoints import model
from benchmarks.gpu.options import Options
from benchmarks.gpu.speed import MAIN_KIND, Plan, serving
from benchmarks.gpu.steps import NotMeasured, Steps
from benchmarks.gpu.worker import run_module
from edge_phi3.bench.load import Level
from edge_phi3.bench.serve import ServeBench, run

_REPORTS = {"kernels": "cuda_gpu_kern_sum", "copies": "cuda_gpu_mem_time_sum", "calls": "cuda_api_sum"}
_MOST_ROWS = 15


def profile(steps: Steps, options: Options) -> None:
    """Run all steps of this part."""
    plan = Plan(options)
    steps.run("profile.step", lambda: _step(options, plan))
    steps.run("profile.kernels", lambda: _kernels(options, plan))
    steps.run("profile.sampling", lambda: _sampling(options, plan))


def _model(options: Options) -> Path:
    return model(options, "4k", MAIN_KIND)


def _more(options: Options) -> list[str]:
    return ["--threads", str(options.threads), *(["--cpu"] if options.cpu else [])]


def _step(options: Options, plan: Plan) -> dict[str, Any]:
    """Split a step inside the process, and set the time per token over HTTP beside it."""
    tokens = 2 * plan.tokens
    arguments = [_model(options), "--rows", ",".join(map(str, plan.clients[:3])), "--tokens", str(tokens)]
    splits = run_module("profile_worker", [*arguments, *_more(options)])
    most = max(plan.clients[:3])
    levels = [Level(clients=rows, sessions=max(4, 2 * rows), warmup=2) for rows in plan.clients[:3]]
    workload = plan.greedy(output_tokens=str(tokens))
    with serving(options, MAIN_KIND, parallel=most, cells=most * 256) as url:
        report = run(ServeBench(url, levels, workload, api="chat"))
    over_http = {level.clients: 1e3 * level.per_token.p50 for level in report.levels if level.per_token is not None}
    for split in splits:
        split["over_http"] = over_http.get(split["rows"]) if split["mode"] == "greedy" else None
    return {"kind": MAIN_KIND, "splits": splits}


def _kernels(options: Options, plan: Plan) -> dict[str, Any]:
    """Let NVIDIA's Nsight Systems record the kernels, copies and CUDA calls of decoding."""
    if options.cpu:
        raise NotMeasured("it is about GPU kernels")
    nsys = shutil.which("nsys") or shutil.which("nsys", path="/usr/local/cuda/bin")
    if nsys is None:
        raise NotMeasured("nsys (NVIDIA Nsight Systems) is not there")
    recorded = options.work / "profile.nsys-rep"
    record = [nsys, "profile", "--trace=cuda", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true"]
    rows = str(max(plan.clients[:3]))
    splits = run_module(
        "profile_worker",
        [_model(options), "--rows", rows, "--modes", "greedy", "--tokens", "64"],
        before=[*record, "--output", str(recorded.with_suffix(""))],
    )
    return {"rows": int(rows), "splits": splits} | {
        name: _statistics(nsys, recorded, report)[:_MOST_ROWS] for name, report in _REPORTS.items()
    }


def _statistics(nsys: str, recorded: Path, report: str) -> list[dict[str, Any]]:
    command = [nsys, "stats", "--force-export=true", "--quiet", "--format", "json", "--report", report, str(recorded)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    start = finished.stdout.find("[")
    if finished.returncode != 0 or start < 0:
        raise RuntimeError(f"nsys stats gave no {report}: {(finished.stderr or finished.stdout).strip()[-300:]}")
    rows: list[dict[str, Any]] = json.JSONDecoder().raw_decode(finished.stdout[start:])[0]
    return rows


def _sampling(options: Options, plan: Plan) -> dict[str, Any]:
    """Compare choosing tokens in llama.cpp's graph with choosing them in NumPy."""
    arguments = [
        _model(options),
        "--rows",
        ",".join(map(str, plan.clients[:3])),
        "--steps",
        "30" if options.small else "200",
    ]
    return {"rows": run_module("gpu_sampling", [*arguments, *_more(options)])}
