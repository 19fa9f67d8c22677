"""A real server process of the installed command on a free port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.services import Server, serving


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one model store for the whole run, so that the demo model is converted once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Server]:
    """Yield the demo model, served at its defaults."""
    with serving(tmp_path_factory.mktemp("server"), store=store) as running:
        yield running
