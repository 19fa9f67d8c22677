"""A Hugging Face checkpoint folder: what its JSON files say, and its tensors, read lazily."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from edge_phi3.conversion.errors import CheckpointError
from edge_phi3.conversion.json_files import read_json
from edge_phi3.conversion.safetensors import StoredTensor
from edge_phi3.conversion.weights import ADAPTER_CONFIG, adapter_error, read_weights


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
        if (folder / ADAPTER_CONFIG).exists():
            raise adapter_error(folder)
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = (
            f"one of the folders in it, such as {inside[-1]}" if inside else "the folder of a Hugging Face checkpoint"
        )
        raise CheckpointError(f"{folder} has no config.json; give {hint}.")
    generation_config = read_json(folder / "generation_config.json") or {}
    tensors, notes = read_weights(folder)
    return Checkpoint(folder, config, generation_config, tensors, tuple(notes))
