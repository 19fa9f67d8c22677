"""A device whose memory is too small: what does not fit is told in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.offload.device import Device, running_device

MIB = 1 << 20
MakeDevice = Callable[[int], AbstractContextManager[Device]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO_CHECKPOINT, tmp_path_factory.mktemp("demo") / "demo-f16.gguf", outtype="f16").path


@pytest.fixture
def device_with(plugin: Path, tmp_path: Path) -> MakeDevice:
    @contextmanager
    def make(memory: int) -> Iterator[Device]:
        with running_device(plugin, tmp_path / "device.log", memory=memory) as device:
            yield device

    return make


@pytest.mark.parametrize("verb", ["serve", "imatrix"])
def test_weights_that_do_not_fit(device_with: MakeDevice, model: Path, tmp_path: Path, verb: str) -> None:
    rest = {"serve": ("--port", "0", "--log-level", "error"), "imatrix": ("-o", tmp_path / "m.gguf", "--chunks", "1")}
    with device_with(8 * MIB) as device:
        refused = device.run("-m", "edge_phi3", verb, model, *rest[verb])
        assert refused.returncode == 1
        sentence = refused.stderr.splitlines()[-1]
        assert sentence.startswith(f"edge-phi3: There is not enough memory for {model} (")
        assert f"unable to allocate {device.buffer} buffer" in sentence
        assert "ower --n-gpu-layers" in sentence
        # Which helps.
        if verb == "imatrix":
            assert device.run("-m", "edge_phi3", verb, model, *rest[verb], "--n-gpu-layers", "0").returncode == 0


def test_a_cache_that_does_not_fit(device_with: MakeDevice, model: Path) -> None:
    with device_with(200 * MIB) as device:
        arguments = ("--port", "0", "--log-level", "error", "--ctx-size", "65536")
        refused = device.run("-m", "edge_phi3", "serve", model, *arguments)
    assert refused.returncode == 1
    sentence = refused.stderr.splitlines()[-1]
    assert sentence.startswith("edge-phi3: llama.cpp cannot make a context of 65536 KV cells of type f16 (")
    assert "Lower --ctx-size" in sentence
