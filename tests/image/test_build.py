"""The image is built, compared with itself and run, where the programs for it are: `pytest -m image`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("build_and_run.sh")


@pytest.mark.image
def test_the_image_is_the_same_twice_changes_in_one_layer_and_serves() -> None:
    missing = [name for name in ("buildah", "debootstrap", "runc") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"{SCRIPT.name} needs root, buildah, debootstrap and runc; missing: {missing}")
    subprocess.run([SCRIPT], check=True)
