"""``edge-phi3 imatrix`` where the activations lie in a device's memory: the sums are those of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import calibration_text
from edge_phi3.conversion.imatrix_file import Imatrix, read_imatrix
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.planning.gguf_layout import read_layout
from tests.offload.device import Device

LAYERS, HIDDEN, FEED_FORWARD = 6, 256, 768
CHUNK, CHUNKS = 64, 4
F32 = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO_CHECKPOINT, tmp_path_factory.mktemp("demo") / "demo-f32.gguf", outtype="f32").path


@pytest.fixture(scope="module")
def arguments(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(calibration_text()[:3000], encoding="utf-8")
    return ["-m", "edge_phi3", "imatrix", str(model), "-f", str(text), "--ctx-size", str(CHUNK)]


@pytest.fixture(scope="module")
def expected(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Imatrix:
    """What the CPU sees."""
    output = tmp_path_factory.mktemp("cpu") / "m.gguf"
    command = [sys.executable, *arguments, "-o", str(output), "--chunks", str(CHUNKS)]
    subprocess.run(command, capture_output=True, check=True, env=os.environ)
    return read_imatrix(output)


def collected(device: Device, arguments: list[str], output: Path, *more: str) -> Imatrix:
    finished = device.run(*arguments, "-o", output, *more)
    assert (finished.returncode, finished.stdout) == (0, f"{output}\n"), finished.stderr
    return read_imatrix(output)


def read_back(device: Device) -> tuple[int, int]:
    """How often the activations of a chunk before a matrix were copied from the device: `HIDDEN` columns, and more."""
    calls = device.calls("get_tensor")
    return calls[CHUNK * HIDDEN * F32], calls[CHUNK * FEED_FORWARD * F32]


def uploaded(device: Device) -> Counter[int]:
    """Sizes of the tensors that were written to the device."""
    return device.calls("set_tensor")


def assert_same(found: Imatrix, expected: Imatrix) -> None:
    """One text, one context, the same kernels in another process: what is summed differs by rounding."""
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-4)
        assert np.corrcoef(found.entries[name].sums[0], entry.sums[0])[0, 1] >= 0.9999


def test_all_layers_on_the_device(
    device: Device, model: Path, arguments: list[str], expected: Imatrix, tmp_path: Path
) -> None:
    assert_same(collected(device, arguments, tmp_path / "m.gguf", "--chunks", str(CHUNKS)), expected)
    # Each of the 24 matrices, in each chunk, once: through ggml's getter, for there is no other way to this memory.
    assert read_back(device) == (3 * LAYERS * CHUNKS, LAYERS * CHUNKS)
    # The weights are all there, but for the embeddings, which llama.cpp looks up on the CPU.
    weights = Counter(tensor.size for tensor in read_layout(model).tensors if tensor.name != "token_embd.weight")
    assert weights <= uploaded(device)


@pytest.mark.parametrize("layers", [3, 0])
def test_some_layers_on_the_device(
    device: Device, arguments: list[str], expected: Imatrix, tmp_path: Path, layers: int
) -> None:
    # The first of the offloaded layers is the output.
    blocks = max(0, layers - 1)
    options = ("--chunks", str(CHUNKS), "--n-gpu-layers", str(layers))
    assert_same(collected(device, arguments, tmp_path / "m.gguf", *options), expected)
    assert read_back(device) == (3 * blocks * CHUNKS, blocks * CHUNKS)


def test_a_collection_on_the_device_goes_on_from_another(
    device: Device, arguments: list[str], expected: Imatrix, tmp_path: Path
) -> None:
    first = tmp_path / "first.gguf"
    assert collected(device, arguments, first, "--chunks", "1").chunk_count == 1
    rest = ("--in-file", str(first), "--from-chunk", "1", "--chunks", str(CHUNKS - 1))
    whole = collected(device, arguments, tmp_path / "whole.gguf", *rest)
    assert whole.chunk_count == CHUNKS
    assert_same(whole, expected)
