"""Property tests are neither in a hurry nor different from run to run; threads that wait leave the cores to others."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure. `--hypothesis-profile random` looks for new examples.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("random"), derandomize=True)
settings.load_profile("fixed")

# llama.cpp's threads spin while they wait for each other, by default, on cores that the other processes of a test need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model store for all services, so that the demo model is converted once."""
    return tmp_path_factory.mktemp("store")
