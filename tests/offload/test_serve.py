"""``edge-phi3 serve`` on a device: transformers' answers, text for text; what does not fit is told in a sentence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.conversion.convert import convert
from tests.golden.pipeline import cases, recorded, write_model
from tests.offload.device import Device, running_device
from tests.support.services import PATIENCE, serving

AT_ONCE = 8
EXACT = ("--threads", "1", "--ctx-size", "4096", "--kv-cache-type", "f32")
MIB = 1 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder)
    return convert(folder, folder / "pipeline.gguf", outtype="f32").path


@pytest.mark.parametrize("layers", [-1, 2, 0])
def test_chat_answers_as_transformers_does(device: Device, model: Path, tmp_path: Path, layers: int) -> None:
    options = (str(model), *EXACT, "--n-gpu-layers", str(layers))
    with (
        serving(tmp_path, *options, environment=device.environment()) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        # Two blocks and the output.
        assert f"{layers if layers >= 0 else 3} of 3 layers on the GPU" in server.log.read_text()

        def text(case: dict[str, Any]) -> str:
            options = {name: value for name, value in case.items() if name != "kwargs"}
            kwargs = {"do_sample": False} | case["kwargs"]
            response = client.post("/chat", json=options | {"generate_kwargs": kwargs})
            assert response.status_code == 200, response.text
            result: str = response.json()["Result"]
            return result

        assert list(pool.map(text, cases())) == ["".join(texts) for texts in recorded()]
        # The device was asked, unless it has no layer.
        assert bool(device.calls("get_tensor")) is (layers != 0)


@pytest.mark.parametrize("verb", ["serve", "imatrix"])
def test_weights_that_do_not_fit(plugin: Path, demo_f16: Path, tmp_path: Path, verb: str) -> None:
    rest: dict[str, tuple[str | Path, ...]] = {
        "serve": ("--port", "0", "--log-level", "error"),
        "imatrix": ("-o", tmp_path / "m.gguf", "--chunks", "1"),
    }
    with running_device(plugin, tmp_path / "device.log", memory=8 * MIB) as device:
        refused = device.run("-m", "edge_phi3", verb, demo_f16, *rest[verb])
        assert refused.returncode == 1
        sentence = refused.stderr.splitlines()[-1]
        assert sentence.startswith(f"edge-phi3: There is not enough memory for {demo_f16} (")
        assert f"unable to allocate {device.buffer} buffer" in sentence
        assert "ower --n-gpu-layers" in sentence
        # Which helps.
        if verb == "imatrix":
            assert device.run("-m", "edge_phi3", verb, demo_f16, *rest[verb], "--n-gpu-layers", "0").returncode == 0


def test_a_cache_that_does_not_fit(plugin: Path, demo_f16: Path, tmp_path: Path) -> None:
    with running_device(plugin, tmp_path / "device.log", memory=200 * MIB) as device:
        arguments = ("--port", "0", "--log-level", "error", "--ctx-size", "65536")
        refused = device.run("-m", "edge_phi3", "serve", demo_f16, *arguments)
    assert refused.returncode == 1
    sentence = refused.stderr.splitlines()[-1]
    assert sentence.startswith("edge-phi3: llama.cpp cannot make a context of 65536 KV cells of type f16 (")
    assert "Lower --ctx-size" in sentence
