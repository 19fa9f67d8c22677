"""Check what edge-phi3 does on llama.cpp's CUDA backend where there is no GPU: on a device in software.

    python -m benchmarks.cuda_parity BUILD/bin                # BUILD is a CUDA build of llama.cpp with its programs
    python -m benchmarks.cuda_parity BUILD/bin --cuda TOOLKIT --only fit --only imatrix

The backend is real and unmodified, its buffers, streams, graphs and scheduling included; the CUDA runtime under it, and
what computes in place of its kernels, is ours: see software_cuda/README.md for what that proves and what not. The build
must be of the llama.cpp that llama-cpp-python brings, for CUDA 13, with GGML_CUDA_NO_VMM and GGML_BACKEND_DL off.

- device: the software device refuses what a GPU would answer with a fault or with garbage.
- fit: what `edge-phi3 fit` plans, against the buffers that llama.cpp's log tells while the engine loads the model, by
  kind and place; and how much more of the device was taken at any time, which `--reserve` is for.
- imatrix: `edge-phi3 imatrix` with all, some and no layers on the device, against the CPU's and llama-imatrix's.
- engine: the tests that tests/offload asks of any device: transformers' recorded answers, token for token.
- serve: the command that `fit` recommends, on a device where all layers fit and where they do not.

Exit code 1 when something is off.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import httpx

from benchmarks.imatrix_parity import LEAST, agreement
from benchmarks.models import CACHE, model_path
from benchmarks.software_cuda import selfcheck
from benchmarks.software_cuda.device import SoftwareDevice, Trace, build_runtime, python_package
from edge_phi3.conversion.imatrix import calibration_text, make_imatrix
from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.api.conftest import PROMPT
from tests.api.test_server import serving
from tests.engine.conftest import OPTIONS
from tests.offload.device import SITE
from tests.offload.test_engine import EXACT, PARTLY, REUSE
from tests.offload.test_fit import ALL, GRID, KINDS, case_of
from tests.planning.test_allocations import ROUNDING, TOLERANCE, Made

GIB, MIB = 1 << 30, 1 << 20
RESERVE = 512 * MIB
"""The default of `edge-phi3 fit --reserve`."""

WIDE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("0.65b", "Q4_K_M", {"n_gpu_layers": ALL}),
    ("0.65b", "Q4_K_M", {"n_gpu_layers": 3, "parallel": 4, "ctx_size": 8192}),
    ("0.65b", "Q4_K_M", {"n_gpu_layers": 2, "kv_cache_type": "q8_0", "ctx_size": 16384}),
    ("0.65b", "Q4_K_M", {"n_gpu_layers": 2, "parallel": 64, "batch_size": 2048}),
    ("0.65b", "Q4_K_M", {"n_gpu_layers": 1, "batch_size": 128, "flash_attn": "off", "kv_cache_type": "f32"}),
    ("0.65b", "Q4_K_M", {"n_gpu_layers": 0}),
    ("0.65b", "Q4_K_M", {"n_gpu_layers": 0, "parallel": 16, "batch_size": 64, "flash_attn": "off"}),
    ("0.65b", "F16", {"n_gpu_layers": ALL}),
    ("0.65b", "F16", {"n_gpu_layers": ALL, "batch_size": 2048, "flash_attn": "off"}),
    ("0.65b", "F16", {"n_gpu_layers": 3, "parallel": 4, "ctx_size": 8192}),
    ("18m", "F32", {"n_gpu_layers": ALL, "flash_attn": "off"}),
)
"""As `GRID`, of models with Phi-3's real widths or its whole vocabulary."""

F32 = 4
HIDDEN, LAYERS = 256, 6
"""Of the demo model."""

Part = Callable[[SoftwareDevice, Path, Path], Iterator[tuple[str, bool]]]
"""Takes the device, the cache and a scratch folder; gives a line for each thing that it looks at, and if it is well."""


def device_part(device: SoftwareDevice, _cache: Path, _work: Path) -> Iterator[tuple[str, bool]]:
    """Try what must not go."""
    ends = {"follow": -11, "leave": -6}
    for name, check in selfcheck.CHECKS.items():
        finished = device.run(sys.executable, selfcheck.__file__, name)
        yield f"{check.__doc__} Exit code {finished.returncode}", finished.returncode == ends.get(name, 0)


def fit_part(device: SoftwareDevice, cache: Path, work: Path) -> Iterator[tuple[str, bool]]:
    """Plan and load each case in a process of its own."""
    made = Made(work)
    cases = [(case, case_of(made, *case)) for case in GRID]
    for name, kind, options in WIDE:
        types = [kind] if kind in {"F16", "F32"} else []
        model = str(model_path(name, cache, kind))
        cases.append(((name, kind, options), {"model": model, "types": types, "options": options, "free": 64 * GIB}))
    for (name, kind, options), case in cases:
        trace = work / "fit.trace"
        trace.unlink(missing_ok=True)
        given = json.dumps([case | {"prompt": True}])
        finished = device.run(sys.executable, SITE / "allocations.py", trace=trace, kernels=False, given=given)
        what = f"{name} {kind} {' '.join(f'{key}={value}' for key, value in options.items())}"
        if finished.returncode != 0:
            yield f"{what}: {finished.stderr[-2000:]}", False
            continue
        (answer,) = json.loads(finished.stdout)
        plan, truth = answer["planned"], answer["allocated"]
        beyond = Trace(trace).peak() - sum(plan["device"].values())
        good = plan["asked"] and re.search(rf"\b{plan['layers']} of \d+ layers on the GPU", truth["said"]) is not None
        parts = []
        for place in ("device", "host"):
            sums = sum(plan[place].values()), sum(truth[place].values())
            pairs = [(plan[place][each], truth[place].get(each, 0)) for each in KINDS] + [sums]
            good &= all(abs(one - other) <= max(TOLERANCE * other, 2 * ROUNDING) for one, other in pairs)
            worst = max((abs(one / other - 1) for one, other in pairs if other > 2 * ROUNDING / TOLERANCE), default=0.0)
            parts.append(f"{place} {sums[0] / MIB:.1f} of {sums[1] / MIB:.1f} MiB, worst kind {worst:.2%} off")
        yield f"{what}: {'; '.join(parts)}; {beyond / MIB:.1f} MiB beyond", good and beyond <= RESERVE


def imatrix_part(device: SoftwareDevice, cache: Path, work: Path) -> Iterator[tuple[str, bool]]:
    """Collect on the device, on the CPU and with llama-imatrix on the device; then in two halves."""
    text = work / "calibration.txt"
    # llama-imatrix wants two chunks at least.
    text.write_text(calibration_text()[:4000], encoding="utf-8")
    options = ("-f", text, "--parse-special", "--threads", "1", "--force")
    ours, theirs, cpu, trace = (work / name for name in ("ours.gguf", "theirs.gguf", "cpu.gguf", "imatrix.trace"))
    for kind, size in [*product(["F32"], (64, 512, 700)), *product(("F16", "Q4_K_M"), [64])]:
        model = model_path("demo", cache, kind)
        expected = make_imatrix(model, cpu, text=text, parse_special=True, ctx_size=size, threads=1, force=True)
        for layers in (ALL, 3, 0):
            trace.unlink(missing_ok=True)
            command = (sys.executable, "-m", "edge_phi3", "imatrix", model, "-o", ours, *options)
            chosen = ("--ctx-size", str(size), "--n-gpu-layers", str(layers))
            finished = device.run(*command, *chosen, trace=trace)
            what = f"demo {kind}, chunks of {size}, layers {layers}"
            if finished.returncode != 0:
                yield f"{what}: {finished.stderr[-2000:]}", False
                continue
            found, calls = read_imatrix(ours), Trace(trace)
            least, same = agreement(found, expected)
            theirs.unlink(missing_ok=True)
            program = device.programs / "llama-imatrix"
            asked = ("-c", str(size), "-b", str(size), "-ub", "512", "-t", "1", "--parse-special", "--no-ppl")
            finished = device.run(program, "-m", model, "-f", text, "-o", theirs, *asked, "-ngl", str(layers % 100))
            if finished.returncode != 0 or not theirs.exists():
                yield f"{what}: llama-imatrix: {finished.stderr[-2000:]}", False
                continue
            other, equal = agreement(found, read_imatrix(theirs))
            # Three of a block's four matrices have activations as wide as the model.
            batches = [min(512, size - start) for start in range(0, size, 512)]
            reads = calls.copies("device-to-host")
            read = all(reads[batch * HIDDEN * F32] >= 3 * LAYERS * found.chunk_count for batch in batches)
            yield (
                f"{what}: {least:.8f} with the CPU, {other:.8f} with llama-imatrix, counts"
                f" {'equal' if same and equal else 'DIFFER'}, {reads.total()} reads, {calls.count('kernel ')} kernels",
                min(least, other) >= LEAST and same and equal and (read or layers != ALL) and bool(reads),
            )
    yield resumed(device, model_path("demo", cache, "F32"), work, options)


def resumed(device: SoftwareDevice, model: Path, work: Path, options: tuple[str | Path, ...]) -> tuple[str, bool]:
    """Collect the first chunk, go on with the others from it, and compare with all at once."""
    command = (sys.executable, "-m", "edge_phi3", "imatrix", model, *options, "--ctx-size", "64", "-o")
    first, whole, at_once = (work / f"{name}.gguf" for name in ("first", "whole", "at-once"))
    for rest in (
        (first, "--chunks", "1"),
        (whole, "--in-file", first, "--from-chunk", "1", "--chunks", "7"),
        (at_once, "--chunks", "8"),
    ):
        finished = device.run(*command, *rest)
        if finished.returncode != 0:
            return f"resumed: {finished.stderr[-2000:]}", False
    least, same = agreement(read_imatrix(whole), read_imatrix(at_once))
    return f"resumed after a chunk of 8: {least:.8f}, counts {'equal' if same else 'DIFFER'}", least >= LEAST and same


def engine_part(device: SoftwareDevice, _cache: Path, work: Path) -> Iterator[tuple[str, bool]]:
    """Run the tests of tests/offload on this device."""
    for tests, options in ((EXACT, {}), (REUSE, {"flash_attn": "on"}), (PARTLY, {"n_gpu_layers": 2})):
        report, trace = work / "report.json", work / "engine.trace"
        trace.unlink(missing_ok=True)
        environment = device.environment() | {"TEST_DEVICE_REPORT": str(report)}
        environment["PYTHONPATH"] += f":{SITE}"
        environment[OPTIONS] = json.dumps({"threads": 1} | options)
        command = ("-m", "pytest", "-q", "-p", "watch_device", "-p", "no:cacheprovider", *tests)
        finished = device.run(sys.executable, *command, trace=trace, more=environment)
        last, seen = (finished.stdout.splitlines() or [""])[-1], json.loads(report.read_text("utf-8"))
        calls = Trace(trace)
        good = finished.returncode == 0 and "CUDA0" in seen["buffers"]["model"] and "CUDA0" in seen["buffers"]["KV"]
        said = f"{calls.count('kernel ')} kernels, {calls.count('launch of ')} launches of captured graphs"
        yield f"engine with {options or 'all layers'}: {last}; {said}", good
        if not good:
            yield finished.stdout[-3000:], False


def serve_part(device: SoftwareDevice, _cache: Path, work: Path) -> Iterator[tuple[str, bool]]:
    """Plan, serve as recommended, ask, and compare the answer and the memory that was taken."""
    # In these types the CPU and the device give the same tokens.
    options = ("--quant", "F32", "--kv-cache-type", "f32", "--ctx-size", "2048", "--json")
    told = fit_and_ask(device, work, (*options, "--device", "cpu"), {"CUDA_VISIBLE_DEVICES": ""})
    yield f"on the CPU: {told['text'][:60]!r}", bool(told["text"]) and told["taken"] == 0
    whole = 0
    for own in (replace(device, memory=4 * GIB), device):
        # The second time so much that three quarters of the model fit.
        memory = own.memory if not whole else RESERVE + (whole * 3 // 4 // MIB) * MIB
        found = fit_and_ask(replace(own, memory=memory), work, options, {})
        planned, taken, layers = found["planned"], found["taken"], found["layers"]
        good = found["text"] == told["text"] and found["free"] == memory
        good &= planned * (1 - TOLERANCE) <= taken <= planned + RESERVE and (layers < 7) == bool(whole) and layers > 0
        yield (
            f"{found['name']}: {layers} of 7 layers, planned {planned / MIB:.1f}, taken at most {taken / MIB:.1f} MiB;"
            f" the CPU's answer {'again' if found['text'] == told['text'] else 'NOT again'}",
            good,
        )
        whole = planned


def fit_and_ask(device: SoftwareDevice, work: Path, options: tuple[str, ...], more: dict[str, str]) -> dict[str, Any]:
    """Serve as `fit` recommends; give what it planned, the answer to a prompt, and what was taken of the device."""
    trace = work / "serve.trace"
    trace.unlink(missing_ok=True)
    finished = device.run(sys.executable, "-m", "edge_phi3", "fit", DEMO_CHECKPOINT, *options, more=more)
    if finished.returncode != 0:
        sys.exit(finished.stderr[-2000:])
    found = json.loads(finished.stdout)
    (row,), (command,) = found["types"], found["recommended"]["commands"]
    with serving(*shlex.split(command)[2:], environment=device.environment(trace) | more, fast=()) as process:
        if row["layers_on_gpu"] is not None:
            process.wait_for(rf"\b{row['layers_on_gpu']} of 7 layers on the GPU")
        request = {"prompt": PROMPT, "generate_kwargs": {"do_sample": False, "max_new_tokens": 60}}
        response = httpx.post(f"{process.url}/chat", json=request, timeout=120, trust_env=False)
        text: str = response.raise_for_status().json()["Result"]
    place = row["gpu"] or {"total": 0}
    machine = found["machine"]
    return {
        "text": text,
        "taken": Trace(trace).peak(),
        "planned": place["total"],
        "layers": row["layers_on_gpu"],
        "name": machine["name"],
        "free": machine["free"],
    }


PARTS: dict[str, Part] = {
    "device": device_part,
    "fit": fit_part,
    "imatrix": imatrix_part,
    "engine": engine_part,
    "serve": serve_part,
}


def main() -> int:
    """Build the device, run the parts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path, help="the folder with libggml-cuda.so and llama-imatrix")
    parser.add_argument("--cuda", type=Path, action="append", default=[], help="where CUDA's headers are; repeatable")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models and the device are kept")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part to run; repeatable; default: all")
    arguments = parser.parse_args()
    if not (arguments.programs / "libggml-cuda.so").exists():
        sys.exit(f"{arguments.programs} has no libggml-cuda.so; name the bin folder of a CUDA build of llama.cpp.")
    runtime = build_runtime(arguments.cache, arguments.cuda)
    well = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        device = SoftwareDevice(
            runtime, arguments.programs, python_package(work / "site", arguments.programs), 80 * GIB
        )
        for name in arguments.only or PARTS:
            for line, good in PARTS[name](device, arguments.cache, work):
                print(f"{'ok ' if good else 'OFF'}  {name:8} {line}", flush=True)
                well &= good
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
