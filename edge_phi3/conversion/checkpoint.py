"""A Hugging Face checkpoint folder: its JSON files, whose entries are checked, and its tensors, read lazily."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from edge_phi3.conversion.errors import CheckpointError
from edge_phi3.conversion.safetensors import SafetensorsFile, StoredTensor

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; nothing but headers has been read of its weights.

    Attributes:
        folder: where it lies.
        config: ``config.json``.
        generation_config: ``generation_config.json``, empty when absent.
        tensors: by name, file after file, in the order of their bytes.
    """

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder` and check that all its files are there and sound.

    As in ``transformers``, a single ``model.safetensors`` is preferred to an index of shards.

    Raises:
        CheckpointError: what is missing or damaged.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}; give the folder of a Hugging Face checkpoint.")
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint.")
    generation_config = read_json(folder / "generation_config.json") or {}
    return Checkpoint(folder, config, generation_config, _open_tensors(folder))


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file that holds a JSON object; return None when there is no such file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return content


def is_number(value: object) -> bool:
    """Tell whether a value of a JSON file is a finite number."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def integer(
    config: dict[str, Any], name: str, default: int | None = None, *, minimum: int = 1, maximum: int = (1 << 31) - 1
) -> int:
    """Return a whole number between two bounds.

    Raises:
        CheckpointError: the entry is something else.
    """
    value = config.get(name, default)
    if type(value) is not int or not minimum <= value <= maximum:
        allowed = f"a whole number from {minimum:,} to {maximum:,}"
        raise CheckpointError(f"config.json: {name} is {shown(value)}; {allowed} is needed.")
    return value


def number(config: dict[str, Any], name: str, default: float | None = None) -> float:
    """Return a positive number.

    Raises:
        CheckpointError: the entry is something else.
    """
    value: Any = config.get(name, default)
    if not is_number(value) or value <= 0:
        raise CheckpointError(f"config.json: {name} is {shown(value)}; a positive number is needed.")
    return float(value)


def shown(value: object) -> str:
    """Return a value as a sentence names it: in Python's spelling, and not too long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _open_tensors(folder: Path) -> dict[str, StoredTensor]:
    if (folder / WEIGHTS_NAME).exists():
        return SafetensorsFile(folder / WEIGHTS_NAME).tensors
    index = read_json(folder / INDEX_NAME)
    if index is None:
        if any(folder.glob("*.bin")):
            raise CheckpointError(f"{folder} has pickled weights (*.bin) only; save it as safetensors first.")
        raise CheckpointError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}.")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map from tensor names to file names.")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"The shard {shard!r}, which {INDEX_NAME} names, is not in {folder}.")
        for name, tensor in SafetensorsFile(folder / shard).tensors.items():
            if weight_map.get(name) != shard:
                owner = f"names {weight_map[name]} for" if name in weight_map else "does not name"
                raise CheckpointError(f"{shard} in {folder} holds {name}, but {INDEX_NAME} {owner} it.")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{INDEX_NAME} promises {name} in {shard}, but it is not there.")
    return tensors
