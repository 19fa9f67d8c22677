"""``edge-phi3 imatrix`` where the activations lie in a device's memory: the sums are those of the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import calibration_text, make_imatrix
from edge_phi3.conversion.imatrix_file import Imatrix, read_imatrix
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.planning.gguf_layout import read_layout
from tests.offload.conftest import Device

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


def assert_same(found: Imatrix, expected: Imatrix) -> None:
    """One text, one context, the same kernels in another process: what is summed differs by rounding."""
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-4)
        assert np.corrcoef(found.entries[name].sums[0], entry.sums[0])[0, 1] >= 0.9999


@pytest.mark.parametrize("layers", [None, 3, 0])
def test_layers_on_the_device(device: Device, folder: Path, tmp_path: Path, layers: int | None) -> None:
    model, text, output = folder / "model.gguf", folder / "text.txt", tmp_path / "m.gguf"
    options = ["--ctx-size", str(CHUNK), "--chunks", str(CHUNKS)]
    options += [] if layers is None else ["--n-gpu-layers", str(layers)]
    finished = device.run("-m", "edge_phi3", "imatrix", model, "-f", text, "-o", output, *options)
    assert (finished.returncode, finished.stdout) == (0, f"{output}\n"), finished.stderr
    assert_same(read_imatrix(output), read_imatrix(folder / "cpu.gguf"))
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
