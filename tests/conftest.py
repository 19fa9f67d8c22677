"""Property tests are neither in a hurry nor different from run to run; threads that wait leave the cores to others."""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure. `--hypothesis-profile random` looks for new examples.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("random"), derandomize=True)
settings.load_profile("fixed")

# llama.cpp's threads spin while they wait for each other, by default, on cores that the other processes of a test need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(autouse=True)
def _same_level_of_the_log() -> Iterator[None]:
    """Return the log to the level that it had before a test."""
    root = logging.getLogger()
    level, disabled = root.level, root.manager.disable
    yield
    root.setLevel(level)
    logging.disable(disabled)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a model by a name and a kind of `tests.support.models`, made once for all tests. Not to be changed."""
    from tests.support.models import model_path

    folder = tmp_path_factory.mktemp("models")
    return lambda name, kind: model_path(name, folder, kind)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return an F32 GGUF of one of the random models of `tests.golden.attention`, made once. Not to be changed."""
    from edge_phi3.conversion.convert import convert
    from tests.golden import attention

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        return convert(attention.write_model(folder, name), folder / f"{name}.gguf", outtype="f32").path

    return make


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model store for all services, so that the demo model is converted once."""
    return tmp_path_factory.mktemp("store")
