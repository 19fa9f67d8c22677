"""A Hugging Face checkpoint folder: its JSON files, whose entries are checked, and its tensors, read lazily."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from edge_phi3.conversion.errors import CheckpointError
from edge_phi3.conversion.safetensors import SafetensorsFile, StoredTensor

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

LARGEST = (1 << 31) - 1
Size = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
PositiveNumber = Annotated[float, msgspec.Meta(gt=0, le=sys.float_info.max)]

_T = TypeVar("_T")


class _Index(msgspec.Struct):
    """``model.safetensors.index.json``: tensor names to file names."""

    weight_map: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, of whose weights only headers have been read.

    `generation_config` is empty when its file is absent; `tensors` are in the order of their bytes, file after file.
    """

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder` and check that all its files are there and sound.

    As in ``transformers``, a single ``model.safetensors`` is preferred to an index of shards.
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
    """Read a file that holds a JSON object; return None when there is no such file."""
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


def typed(content: object, kind: type[_T], source: str) -> _T:
    """Return what a JSON file holds as the type that it should have."""
    try:
        return msgspec.convert(content, kind, str_keys=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        entry = where.strip("`").removeprefix("$").removeprefix(".")
        raise CheckpointError(f"{source}: {entry and f'{entry}: '}{what[0].lower()}{what[1:]}.") from error


def _open_tensors(folder: Path) -> dict[str, StoredTensor]:
    if (folder / WEIGHTS_NAME).exists():
        return SafetensorsFile(folder / WEIGHTS_NAME).tensors
    index = read_json(folder / INDEX_NAME)
    if index is None:
        if any(folder.glob("*.bin")):
            raise CheckpointError(f"{folder} has pickled weights (*.bin) only; save it as safetensors first.")
        raise CheckpointError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}.")
    weight_map = typed(index, _Index, INDEX_NAME).weight_map
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
