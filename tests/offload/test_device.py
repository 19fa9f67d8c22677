"""The engine's own tests once more, with layers and KV cache in a device's memory: not a token may change.

They run unchanged in a process that has the device, so that transformers' recorded answers are asked of it too. Of
``edge-phi3 imatrix``, whose activations lie there, the sums are those of the CPU. What ``edge-phi3 fit`` plans is what
llama.cpp then allocates there; what does not fit is told.
"""

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import calibration_text, make_imatrix
from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.planning.gguf_layout import read_layout
from tests.offload.conftest import Device, running_device
from tests.planning.buffers import TOLERANCE, check
from tests.planning.test_fit import Made
from tests.support.cases import cases, tables
from tests.support.engines import OPTIONS
from tests.support.services import serving

TESTS: dict[str, list[str]] = tables(__file__)["TESTS"]


def run(device: Device, report: Path, tests: str, **options: Any) -> dict[str, Any]:
    """Run tests on the device, all of which must pass, and return what was seen of the buffers."""
    finished = device.run(
        *("-m", "pytest", "-q", "-p", "tests.planning.buffers", "-p", "no:cacheprovider", *TESTS[tests]),
        seconds=1800,
        # The device computes; more threads here would only wait for it on its cores.
        **{OPTIONS: json.dumps({"threads": 1} | options), "TEST_DEVICE_REPORT": str(report)},
        TEST_GOLDEN_EVERY="1" if tests == "modes" else "16",
    )
    assert finished.returncode == 0, finished.stdout[-6000:]
    last = finished.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d+ passed(, \d+ deselected)? in .*", last), finished.stdout[-1000:]
    found: dict[str, Any] = json.loads(report.read_text())
    assert len(found["starts"]) >= len(TESTS[tests])
    return found


@cases
def test_all_layers_on_the_device(device: Device, tmp_path: Path, tests: str, options: dict[str, Any]) -> None:
    found = run(device, tmp_path / "report.json", tests, **options)
    for line in found["starts"]:
        assert re.search(r"\b(\d+) of \1 layers on the GPU", line), line
    assert found["buffers"]["KV"] == [device.buffer]
    # The embeddings alone stay: llama.cpp looks them up on the CPU.
    assert found["buffers"]["model"] == ["CPU_Mapped", device.buffer]
    assert device.buffer in found["buffers"]["compute"]


def test_the_last_block_and_the_output_on_the_device(device: Device, tmp_path: Path) -> None:
    found = run(device, tmp_path / "report.json", "partly", n_gpu_layers=2)
    assert all("2 of 3 layers on the GPU" in line for line in found["starts"])
    assert found["buffers"]["KV"] == ["CPU", device.buffer]


LAYERS, HIDDEN, FEED_FORWARD = 6, 256, 768
CHUNK, CHUNKS = 64, 4
F32 = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, a text, and what the CPU collects."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "text.txt").write_text(calibration_text()[:3000], encoding="utf-8")
    model = convert(DEMO_CHECKPOINT, folder / "model.gguf", outtype="f32").path
    make_imatrix(model, folder / "cpu.gguf", text=folder / "text.txt", ctx_size=CHUNK, chunks=CHUNKS)
    return folder


@pytest.mark.parametrize("layers", [None, 3, 0])
def test_layers_on_the_device(device: Device, folder: Path, tmp_path: Path, layers: int | None) -> None:
    model, text, output = folder / "model.gguf", folder / "text.txt", tmp_path / "m.gguf"
    options = ["--ctx-size", str(CHUNK), "--chunks", str(CHUNKS)]
    options += [] if layers is None else ["--n-gpu-layers", str(layers)]
    finished = device.run("-m", "edge_phi3", "imatrix", model, "-f", text, "-o", output, *options)
    assert (finished.returncode, finished.stdout) == (0, f"{output}\n"), finished.stderr
    found, expected = read_imatrix(output), read_imatrix(folder / "cpu.gguf")
    assert found.entries.keys() == expected.entries.keys()
    # One text, one context, the same kernels in another process: what is summed differs by rounding.
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-4)
        assert np.corrcoef(found.entries[name].sums[0], entry.sums[0])[0, 1] >= 0.9999
    # The first of the offloaded layers is the output.
    blocks = LAYERS if layers is None else max(0, layers - 1)
    # The activations before each of the matrices there, in each chunk, once: through ggml's getter, the only way to
    # this memory. Three matrices of a block have `HIDDEN` columns, and one more.
    calls = device.calls("get_tensor")
    assert calls[CHUNK * HIDDEN * F32] == 3 * blocks * CHUNKS
    assert calls[CHUNK * FEED_FORWARD * F32] == blocks * CHUNKS
    if layers is None:
        # The weights are all there, but for the embeddings, which llama.cpp looks up on the CPU.
        tensors = read_layout(model).tensors
        weights = Counter(tensor.size for tensor in tensors if tensor.name != "token_embd.weight")
        assert weights <= device.calls("set_tensor")


GIB = 1 << 30
ALL = -1

GRID: tuple[tuple[str, str, dict[str, Any]], ...] = tables(__file__)["GRID"]
"""Model, type, and how it is served."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("models"))


def compared(device: Device, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plan each case and load it, in a process with the device, and compare."""
    finished = device.run("-m", "tests.planning.buffers", given=json.dumps(cases))
    assert finished.returncode == 0, finished.stderr[-4000:]
    answers: list[dict[str, Any]] = json.loads(finished.stdout)
    for answer in answers:
        assert answer["asked"], "the device told its compute buffers"
        check(answer["planned"], answer["allocated"])
    return answers


def case_of(made: Made, model: str, kind: str, options: dict[str, Any], free: int = 4 * GIB) -> dict[str, Any]:
    types = [kind] if kind in {"F16", "F32"} else []
    return {"model": str(made.gguf(model, kind)), "types": types, "options": options, "free": free}


def test_types_contexts_parallelism_and_layers(device: Device, made: Made) -> None:
    answers = compared(device, [case_of(made, *case) for case in GRID])
    for (_, _, options), answer in zip(GRID, answers, strict=True):
        asked = options["n_gpu_layers"]
        layers = 4 if asked == ALL else asked
        assert answer["layers"] == layers
        assert (f"{layers} of 4 layers on the GPU" if layers else "all layers on the CPU") in answer["said"]
        # Layers lie where they are said to: the device has weights with the first, and KV cache with the second.
        on_device = answer["allocated"]["device"]
        assert bool(on_device.get("model")) is (layers > 0)
        assert bool(on_device.get("KV")) is (layers > 1)


def test_as_many_layers_as_fit_are_loaded_and_do_fit(device: Device, made: Made) -> None:
    options = {"ctx_size": 8192, "parallel": 4}
    (whole,) = compared(device, [case_of(made, "4k", "F16", options)])
    total = sum(whole["allocated"]["device"].values())
    budgets = [total * part // 10 for part in (9, 7)]
    answers = compared(device, [case_of(made, "4k", "F16", options, free=free) for free in budgets])
    for free, answer in zip(budgets, answers, strict=True):
        assert 0 < answer["layers"] < 4
        assert sum(answer["allocated"]["device"].values()) <= free * (1 + TOLERANCE)
    assert answers[1]["layers"] < answers[0]["layers"]


def answer(device: Device, *arguments: str | Path) -> dict[str, Any]:
    finished = device.run("-m", "edge_phi3", "fit", *arguments, "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def serve_as_recommended(device: Device, folder: Path, found: dict[str, Any]) -> None:
    """Run the command of a plan, and compare what it takes of the device with the plan."""
    (row,) = found["types"]
    assert row["fits"]
    assert found["gpu_buffers_from_gpu"]
    (command,) = found["recommended"]["commands"]
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("edge-phi3", "serve")
    with serving(folder, *arguments, environment=device.environment()) as server:
        assert f"{row['layers_on_gpu']} of 7 layers on the GPU" in server.log.read_text()
        # What its server was asked to allocate, of all that it was asked.
        allocated = sum(device.calls("alloc_buffer").elements())
        prompt = "<|user|>\nWhat does len do?<|end|>\n<|assistant|>\n"
        answered = server.post("/chat", prompt=prompt, return_full_text=False, generate_kwargs={"do_sample": False})
        assert answered.json()["Result"].strip(), answered.text
        assert device.calls("get_tensor"), "the device was asked"
    assert row["gpu"]["total"] == pytest.approx(allocated, rel=TOLERANCE)


def test_the_recommended_command_serves_as_planned(device: Device, demo_f16: Path, tmp_path: Path) -> None:
    found = answer(device, demo_f16, "--quant", "F16")
    # NVML knows of no GPU here; llama.cpp told of this one, and how much of its memory is free.
    assert found["machine"]["name"].startswith(device.endpoint)
    assert found["machine"]["free"] > GIB
    assert found["types"][0]["layers_on_gpu"] == found["layers"] == 7
    serve_as_recommended(device, tmp_path, found)


def test_on_a_smaller_device_it_serves_with_fewer_layers(device: Device, demo_f16: Path, tmp_path: Path) -> None:
    options = (demo_f16, "--quant", "F16", "--ctx-size", "2048")
    needed = answer(device, *options)["types"][0]["gpu"]["total"]
    found = answer(device, *options, "--device", "gpu", "--memory", str(needed * 3 // 4), "--reserve", "0")
    assert 0 < found["types"][0]["layers_on_gpu"] < 7
    serve_as_recommended(device, tmp_path, found)


@cases
def test_what_does_not_fit_is_told(
    plugin: Path, demo_f16: Path, tmp_path: Path, *, memory: int, verb: str, options: list[str], sentence: str
) -> None:
    command = ("-m", "edge_phi3", verb, str(demo_f16), *(option.format(tmp_path) for option in options))
    with running_device(plugin, tmp_path / "device.log", memory=memory << 20) as device:
        refused = device.run(*command)
        assert refused.returncode == 1
        assert re.fullmatch(f"edge-phi3: {sentence.format(demo_f16)}", refused.stderr.splitlines()[-1])
        if verb == "imatrix":
            assert device.run(*command, "--n-gpu-layers", "0").returncode == 0, "which helps"
