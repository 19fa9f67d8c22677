"""``edge-phi3 serve`` with its layers on a device: the answers are those of transformers, text for text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.conversion.convert import convert
from tests.api.conftest import PATIENCE
from tests.api.test_server import serving
from tests.golden.pipeline import cases, recorded, write_model
from tests.offload.device import Device

AT_ONCE = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder)
    return convert(folder, folder / "pipeline.gguf", outtype="f32").path


@pytest.mark.parametrize("layers", [-1, 2, 0])
def test_chat_answers_as_transformers_does(device: Device, model: Path, layers: int) -> None:
    with (
        serving(str(model), "--n-gpu-layers", str(layers), environment=device.environment()) as process,
        httpx.Client(base_url=process.url, timeout=PATIENCE, trust_env=False) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        # Two blocks and the output.
        process.wait_for(f"{layers if layers >= 0 else 3} of 3 layers on the GPU")

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
