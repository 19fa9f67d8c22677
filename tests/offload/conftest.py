"""A device for each test, whose backend is compiled once a machine, and the demo model to lay on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_phi3.conversion.convert import convert
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.offload.device import Device, build_plugin, running_device


@pytest.fixture(scope="session")
def plugin() -> Path:
    return build_plugin()


@pytest.fixture
def device(plugin: Path, tmp_path: Path) -> Iterator[Device]:
    with running_device(plugin, tmp_path / "device.log") as running:
        yield running


@pytest.fixture(scope="session")
def demo_f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DEMO_CHECKPOINT, tmp_path_factory.mktemp("demo") / "demo-f16.gguf", outtype="f16").path
