"""One small checkpoint for all tests of a session, copies of it to damage, and one small model to quantise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conversion.random_gguf import write_random
from tests.golden.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of one layer in two shards. Not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("pristine") / "phi-3-tiny", layers=1, dtype="bfloat16", shards=2)


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy of `pristine` that a test may change."""
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random F16 model that is quantised. Not to be changed."""
    path = tmp_path_factory.mktemp("source") / "model-f16.gguf"
    write_random(path)
    return path


@pytest.fixture
def edit() -> Callable[..., None]:
    """Change entries of a JSON file: ``edit(path, name=value, ...)``; a value of `...` removes the entry."""

    def change(path: Path, **entries: Any) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, value in entries.items():
            content.pop(name, None)
            if value is not ...:
                content[name] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return change
