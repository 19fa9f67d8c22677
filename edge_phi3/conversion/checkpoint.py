"""A Hugging Face checkpoint folder: what its JSON files say, and its tensors, read lazily."""

import dataclasses
from pathlib import Path
from typing import Any

from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.json_files import read_json
from edge_phi3.conversion.safetensors import StoredTensor
from edge_phi3.conversion.weights import ADAPTER_CONFIG, adapter_error, inside, read_weights


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, of whose weights only headers have been read.

    `generation_config` is empty when its file is absent; `tensors` are as `read_weights` gives them, and `notes`
    sentences on what is odd, for whoever converts.
    """

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    notes: tuple[str, ...]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder` and check that all its files are there and sound."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; give the folder of a Hugging Face checkpoint.")
    config = read_json(folder / "config.json")
    if config is None:
        raise no_checkpoint(folder)
    generation_config = read_json(folder / "generation_config.json") or {}
    tensors, notes = read_weights(folder)
    return Checkpoint(folder, config, generation_config, tensors, tuple(notes))


def no_checkpoint(folder: Path) -> CheckpointError | UnsupportedModelError:
    """Return the refusal of a folder without a config.json."""
    if (folder / ADAPTER_CONFIG).exists():
        return adapter_error(folder)
    give = inside(folder, "config.json") or "the folder of a Hugging Face checkpoint"
    return CheckpointError(f"{folder} has no config.json; give {give}.")
