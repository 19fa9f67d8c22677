"""The engine's own tests once more, with layers and KV cache in a device's memory: not a token may change.

They run unchanged in a process that has the device, so that transformers' recorded answers are asked of it too.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

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
        TEST_GOLDEN_EVERY="1" if tests == "modes" else "4",
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
