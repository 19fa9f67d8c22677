"""A device for each test; its backend is compiled once a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.offload.device import Device, build_plugin, running_device


@pytest.fixture(scope="session")
def plugin() -> Path:
    return build_plugin()


@pytest.fixture
def device(plugin: Path, tmp_path: Path) -> Iterator[Device]:
    with running_device(plugin, tmp_path / "device.log") as running:
        yield running
