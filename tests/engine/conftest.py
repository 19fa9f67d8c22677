"""Small converted checkpoints, and a short way to run one request on them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_phi3.conversion.convert import convert
from tests.golden import attention
from tests.support.engines import OPTIONS, Asked, ask, engine_at_rest, generated, running_engine

__all__ = ["OPTIONS", "Asked", "MakeModel", "ask", "engine_at_rest", "generated", "running_engine"]

MakeModel = Callable[[str], Path]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Convert the random checkpoint "4k" or "128k" to an F32 GGUF, once a run."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            attention.write_model(folder, name)
            made[name] = convert(folder, folder / f"{name}.gguf", outtype="f32").path
        return made[name]

    return make
