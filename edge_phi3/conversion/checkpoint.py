"""A Hugging Face checkpoint folder: what its JSON files say, which files hold its weights, and what they are called.

Folders come as many tools leave them: shards without an index, an index that is stale, and names with what a wrapper
puts in front of them. The files themselves are believed, and an index only says which of them to open. The
``safetensors`` package checks their headers; values are taken from the mapped file, since NumPy has no bfloat16.
"""

import functools
import math
import mmap
import os
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edge_phi3.conversion import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.json_files import read_json, typed
from edge_phi3.files import open_regular

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SHARD = re.compile(r"-\d+(-of-\d+\.safetensors)$")
# Safetensors beside a model that are no part of it: adapters, and the value heads of reinforcement learning.
_NO_MODEL = ("adapter_", "value_head")

# Parts of a name that torch.compile, data parallelism, activation checkpoints and peft put into it.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
_OUTER = frozenset({"base_model", "language_model", "model", "policy", "pretrained_model"})
_INNER = frozenset({"embed_tokens", "layers", "norm"})
_ADAPTER_PARTS = re.compile(r"\.(lora_\w+|modules_to_save|original_module)\.")
# Old revisions stored the rotary frequencies, which follow from config.json; trl stores what it valued answers with.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb|v_head)\.")

# What trainers leave beside the weights, or in their place.
_BESIDE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+")

_UNREAD = dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".distcp"), "a pickle, which can run code when it is read")
_UNREAD |= {".h5": "a file of TensorFlow's format", ".msgpack": "a file of Flax's format"}
_TO_SAFETENSORS = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "M.from_pretrained({0!r}, torch_dtype='auto').save_pretrained({1!r}); "
    "T.from_pretrained({0!r}).save_pretrained({1!r})"
)


_RAW: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}


class SafetensorsFile:
    """A safetensors file with a sound header; its tensors are in the order of their bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with open_regular(path) as file, safe_open(path, "numpy") as header:
                begin = 8 + int.from_bytes(file.read(8), "little")
                for name in header.offset_keys():
                    entry = header.get_slice(name)
                    tensor = StoredTensor(self, name, entry.get_dtype(), tuple(entry.get_shape()), begin)
                    self.tensors[name] = tensor
                    begin += tensor.nbytes
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a sound safetensors file ({error}). Download it again.") from error

    @functools.cached_property
    def map(self) -> mmap.mmap:
        """The whole file, mapped read-only."""
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        return mapped


class StoredTensor(NamedTuple):
    """One tensor of a file: where its bytes begin, and what they mean."""

    file: SafetensorsFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes; every dtype's name tells its bits, but for that of booleans."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * (int(bits[0]) if bits else 8) // 8

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a read-only view of the flattened tensor, shape (stop - start,): float32, or uint16 holding bits."""
        dtype = _RAW[self.dtype]
        return np.frombuffer(self.file.map, dtype, stop - start, self.begin + start * dtype.itemsize)

    def equals(self, other: Self) -> bool:
        """Return whether another tensor has the same type, shape and bytes."""
        mine, theirs = (memoryview(one.file.map)[one.begin : one.begin + one.nbytes] for one in (self, other))
        return (self.dtype, self.shape) == (other.dtype, other.shape) and mine == theirs

    def drop(self, start: int, stop: int) -> None:
        """Return the memory of values `start` to `stop` back to the system; they can still be read again."""
        item_size = _RAW[self.dtype].itemsize
        begin = (self.begin + start * item_size) // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.map.madvise(mmap.MADV_DONTNEED, begin, self.begin + stop * item_size - begin)


class Checkpoint(NamedTuple):
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


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_weights(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors of a checkpoint, and sentences on what its index has wrong.

    The tensors are in the order of their bytes, file after file, under the names that ``Phi3ForCausalLM`` gives them;
    buffers are left out. As in ``transformers``, a single ``model.safetensors`` is preferred to shards.

    Raises:
        CheckpointError: a file is missing or damaged, or two hold different values of one tensor.
        UnsupportedModelError: they are no safetensors, or those of an adapter.
    """
    weight_map = _read_index(folder)
    chosen = choose_weights((path.name for path in folder.glob("*.safetensors")), weight_map.values())
    if not chosen:
        raise _no_weights(folder, weight_map.values())
    tensors: dict[str, StoredTensor] = {}
    notes = []
    for path in (folder / name for name in chosen):
        for stored in SafetensorsFile(path).tensors.values():
            if _BUFFERS.search(stored.name):
                continue
            name = canonical_name(stored.name)
            if (other := tensors.get(name)) is None:
                tensors[name] = stored
                continue
            here, there = (f"{tensor.name} of {tensor.file.path.name}" for tensor in (stored, other))
            if not stored.equals(other):
                raise CheckpointError(
                    f"{here} and {there} are both {name}, with different values; remove the file that is not the "
                    "model's."
                )
            notes.append(f"{here} is {there} once more, and is left out.")
    if weight_map:
        notes += _compare_index(weight_map, tensors, folder)
    return tensors, notes


def choose_weights(present: Iterable[str], named: Collection[str]) -> list[str]:
    """Return those of the files that are `present` in a folder which hold its model; the index has `named` some."""
    stored = sorted(name for name in present if name.endswith(".safetensors") and not name.startswith(_NO_MODEL))
    if WEIGHTS_NAME in stored:
        return [WEIGHTS_NAME]
    # An index may name only some shards of a set, or another set.
    sets = {set_of(name) for name in named} - {None}
    chosen = [name for name in stored if name in named or set_of(name) in sets]
    return chosen or [name for name in stored if set_of(name)] or stored


def set_of(name: str) -> str | None:
    """Return a shard's name without its number, which all shards of its set share; None when it is no shard's."""
    return _SHARD.sub(r"\1", name) if _SHARD.search(name) else None


def canonical_name(name: str) -> str:
    """Return what ``Phi3ForCausalLM`` calls a tensor, without what wrappers around the model add to its name."""
    if _ADAPTER_PARTS.search(f".{name}"):
        raise UnsupportedModelError(
            f"The checkpoint holds {name}, a weight of an adapter that is not merged yet: call merge_and_unload() of "
            "peft, and save_pretrained() again."
        )
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    inner = next((i for i, part in enumerate(parts) if part not in _OUTER), 0)
    parts = parts[inner:]
    return ".".join(["model", *parts] if parts[0] in _INNER else parts)


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file that holds each tensor, as the index has it: nothing where there is none, or it is not asked."""
    if (folder / WEIGHTS_NAME).exists() or (index := read_json(folder / INDEX_NAME)) is None:
        return {}
    weight_map = typed(index, _Index, INDEX_NAME).weight_map
    for shard in weight_map.values():
        if Path(shard).name != shard or shard in {"", ".", ".."} or "\0" in shard or len(os.fsencode(shard)) > 255:
            raise CheckpointError(f"The shard {shard[:300]!r}, which {INDEX_NAME} names, is not in {folder}.")
    return weight_map


def _no_weights(folder: Path, named: Iterable[str]) -> CheckpointError | UnsupportedModelError:
    if (folder / ADAPTER_CONFIG).exists():
        return adapter_error(folder)
    others = [path for path in sorted(folder.iterdir()) if path.suffix in _UNREAD and not _BESIDE.fullmatch(path.name)]
    if others:
        command = _TO_SAFETENSORS.format(str(folder), f"{folder}-safetensors")
        return UnsupportedModelError(
            f"{folder} has its weights in {others[0].name}, {_UNREAD[others[0].suffix]}; only safetensors are read. "
            f"If you trust it, make safetensors of it: python -c {shlex.quote(command)}"
        )
    if missing := sorted(named):
        return CheckpointError(f"The shard {missing[0]!r}, which {INDEX_NAME} names, is not in {folder}.")
    hint = (found := inside(folder, "*.safetensors")) and f"; give {found}"
    return CheckpointError(f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}, nor any other safetensors{hint}.")


def inside(folder: Path, name: str) -> str:
    """Return words for a folder in this one that has such a file, the last one that a trainer saved; none if none."""
    found = [path.parent.name for path in folder.glob(f"*/{name}")]
    return f"one of the folders in it, such as {max(found, key=lambda each: (len(each), each))}" if found else ""


def adapter_error(place: object) -> UnsupportedModelError:
    """Return the refusal of a folder or repository that holds an adapter, and no model."""
    return UnsupportedModelError(
        f"{place} is an adapter ({ADAPTER_CONFIG}), not a whole model: convert it by itself (edge-phi3 convert) and "
        "serve it beside its model (--lora), or merge it with merge_and_unload() of peft, and give the folder of what "
        "save_pretrained() writes."
    )


def _compare_index(weight_map: dict[str, str], tensors: dict[str, StoredTensor], folder: Path) -> list[str]:
    """Return sentences on where the index and the files differ; a whole file that is needed and missing is an error."""
    promised = {canonical_name(name): shard for name, shard in weight_map.items()}
    absent = {name: shard for name, shard in promised.items() if name not in tensors}
    for name, shard in absent.items():
        if not (folder / shard).is_file() and not _BUFFERS.search(name):
            raise CheckpointError(f"The shard {shard!r}, which {INDEX_NAME} names, is not in {folder}.")
    notes = [f"{INDEX_NAME} names {some(absent)}, which no file has."] if absent else []
    elsewhere = [name for name, stored in tensors.items() if promised.get(name) != stored.file.path.name]
    if elsewhere:
        notes.append(f"{INDEX_NAME} does not say where {some(elsewhere)} is; the files count.")
    return notes


def some(names: Iterable[str]) -> str:
    """Return the first of some names, and how many more there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
