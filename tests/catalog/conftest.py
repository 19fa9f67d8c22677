"""A checkpoint small enough to convert in a moment, and the Hub that publishes it."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from edge_phi3.catalog import Catalog
from edge_phi3.progress import ProgressReporter, Step
from tests.catalog.hub_server import HubServer, Repository
from tests.golden.checkpoints import write_checkpoint

SHARD = "model-00001-of-00002.safetensors"
"""One of the checkpoint's two files of weights."""


class Notes(ProgressReporter):
    """A progress reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.notes: list[str] = []

    @property
    def titles(self) -> list[str]:
        return [step.title for step in self.steps]

    def _begun(self, step: Step) -> None:
        self.steps.append(step)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded bfloat16 checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-phi3", dtype="bfloat16", shards=2)


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The Hub, with the checkpoint as owner/tiny and files beside it that nobody needs."""
    with HubServer() as server:
        repository = server.repositories["owner/tiny"] = Repository.of(checkpoint)
        repository.files |= {
            "pytorch_model.bin": b"pickle" * 1000,
            "modeling_phi3.py": b"import os",
            "figures/loss.png": b"\x89PNG",
            "README.md": b"---\nlicense: mit\n---\n# Tiny",
        }
        monkeypatch.setenv("HF_ENDPOINT", f"{server.endpoint}/")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("edge_phi3.catalog.hub._WAIT", 0.01)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield server


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "store")


def files_below(folder: Path) -> list[str]:
    """Name the files of a folder and of those in it, locks left out."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    )
