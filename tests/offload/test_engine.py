"""The engine's own tests once more, with layers and KV cache in a device's memory: not a token may change.

They run unchanged in a process that has the device, so that transformers' recorded answers are asked of it too. Of
``edge-phi3 imatrix``, whose activations lie there, the sums are those of the CPU.
"""

import json
import re
import tomllib
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
from tests.engine.conftest import OPTIONS
from tests.offload.conftest import Device

MODES = pytest.param("modes", {}, marks=pytest.mark.soak)
TESTS = tomllib.loads(Path(__file__).with_name("engine_tests.toml").read_text(encoding="utf-8"))


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
    assert re.fullmatch(r"\d+ passed in .*", finished.stdout.splitlines()[-1]), finished.stdout[-1000:]
    found: dict[str, Any] = json.loads(report.read_text())
    assert len(found["starts"]) >= len(TESTS[tests])
    return found


@pytest.mark.parametrize(("tests", "options"), [("exact", {}), ("reuse", {"flash_attn": "on"}), MODES])
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
