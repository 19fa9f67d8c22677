"""What people's tools do to a checkpoint: edits of one with one layer, two shards, and two key heads for four heads.

Tables name them with what they take beside the checkpoint's folder.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.conversion.conftest import edit, edited_weights

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"


def apply(folder: Path, *edits: str | dict[str, Any]) -> None:
    """Make some edits: functions of this module by name, each with its arguments, a list or a map of them."""
    for step in edits:
        ((name, given),) = step.items() if isinstance(step, dict) else ((step, []),)
        change: Callable[..., object] = globals()[name]
        change(folder, **given) if isinstance(given, dict) else change(folder, *given)


def removed(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        paths = [*folder.glob(pattern)]
        assert paths, pattern
        for path in paths:
            path.unlink()


def written(folder: Path, *names: str) -> None:
    for name in names:
        text(folder, name, "x")


def text(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")


def moved(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


def config(folder: Path, **entries: Any) -> None:
    edit(folder / "config.json", **entries)


def without(folder: Path, *names: str) -> None:
    """Take entries out of config.json."""
    edit(folder / "config.json", **dict.fromkeys(names, ...))


def shards(folder: Path) -> Iterator[tuple[dict[str, Any], bytearray]]:
    """Yield header and data of each shard to be changed, and make the index of what came out."""
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with edited_weights(path) as (header, data):
            yield header, data
            weight_map |= dict.fromkeys(header.keys() - {"__metadata__"}, path.name)
    if (folder / INDEX).exists():
        edit(folder / INDEX, weight_map=weight_map)


def renamed(folder: Path, pattern: str, replacement: str) -> None:
    """Give weights other names: the first match of a regular expression is replaced."""
    for header, _ in shards(folder):
        names = [name for name in header if name != "__metadata__"]
        header.update({re.sub(pattern, replacement, name, count=1): header.pop(name) for name in names})


def split(folder: Path, wanted: str = "", groups: int = 2) -> None:
    """Store q, k, v and gate, up as matrices of their own, the last first, of all that are `wanted`.

    So many heads share keys and values.
    """
    shares = {"qkv_proj": {"q_proj": groups, "k_proj": 1, "v_proj": 1}, "gate_up_proj": {"gate_proj": 1, "up_proj": 1}}
    for header, data in shards(folder):
        for name in [name for name in header if wanted in name and not shares.keys().isdisjoint(name.split("."))]:
            fused = name.split(".")[-2]
            entry = header.pop(name)
            begin, end = entry["data_offsets"]
            values, cut = bytes(data[begin:end]), 0
            for part, share in shares[fused].items():
                rows, size = (n * share // sum(shares[fused].values()) for n in (entry["shape"][0], len(values)))
                data[end - size : end] = values[cut : cut + size]
                place = {"shape": [rows, *entry["shape"][1:]], "data_offsets": [end - size, end]}
                header[name.replace(fused, part)] = entry | place
                end, cut = end - size, cut + size


def index(
    folder: Path, *, without: str = "$^", files: Sequence[str] = ("", ""), backwards: bool = False, **more: str
) -> None:
    """Change the index: leave out names or files, replace a part of files' names, turn the order round, add `more`."""
    found = json.loads((folder / INDEX).read_text())["weight_map"]
    kept = {name: file.replace(*files) for name, file in found.items() if not re.search(without, f"{name}\n{file}")}
    edit(folder / INDEX, weight_map=dict(reversed(kept.items()) if backwards else kept.items()) | more)


def one_shard(folder: Path) -> None:
    headers: dict[str, Any] = {}
    data = bytearray()
    for header, content in shards(folder):
        for entry in (entry for name, entry in header.items() if name != "__metadata__"):
            entry["data_offsets"] = [offset + len(data) for offset in entry["data_offsets"]]
        headers |= header
        data += content
    removed(folder, SECOND, INDEX)
    moved(folder, FIRST, "model-00001-of-00001.safetensors")
    with edited_weights(folder / "model-00001-of-00001.safetensors") as (header, content):
        header.update(headers)
        content[:] = data


def twice(folder: Path, change: int = 0) -> None:
    """Store a norm of the second shard at the end of the first as well."""
    with edited_weights(folder / SECOND) as (header, data):
        begin, end = header[NORM]["data_offsets"]
        entry, norm = header[NORM], data[begin:end]
    norm[0] ^= change
    with edited_weights(folder / FIRST) as (header, data):
        header[NORM] = entry | {"data_offsets": [len(data), len(data) + len(norm)]}
        data.extend(norm)


def buffers(folder: Path, *names: str) -> None:
    with edited_weights(folder / SECOND) as (header, data):
        for name in names:
            header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
            data.extend(bytes(8))


def stored_anew(folder: Path, change: Callable[[str, dict[str, Any], bytes], bytes]) -> None:
    """Store what `change` makes of each tensor's name, entry and values."""
    for header, data in shards(folder):
        before = bytes(data)
        data.clear()
        for name in header.keys() - {"__metadata__"}:
            begin, end = header[name]["data_offsets"]
            values = change(name, header[name], before[begin:end])
            header[name]["data_offsets"] = [len(data), len(data) + len(values)]
            data.extend(values)


def widened(folder: Path, wanted: str) -> None:
    """Store what has this in its name in float32."""

    def change(name: str, entry: dict[str, Any], values: bytes) -> bytes:
        if wanted not in name:
            return values
        entry["dtype"] = "F32"
        return (np.frombuffer(values, "<u2").astype("<u4") << 16).astype("<u4").tobytes()

    stored_anew(folder, change)


def ungathered(folder: Path) -> None:
    """Leave of a norm what DeepSpeed does where it gathers no weights."""

    def change(name: str, entry: dict[str, Any], values: bytes) -> bytes:
        entry["shape"] = [0] if name == NORM else entry["shape"]
        return b"" if name == NORM else values

    stored_anew(folder, change)


def marked(folder: Path) -> None:
    for path in [*folder.glob("*.json"), folder / "README.md"]:
        path.write_bytes(b"\xef\xbb\xbf" + (path.read_bytes() if path.exists() else b"# A model"))


def template_file(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    text(folder, "chat_template.jinja", content["chat_template"])
    edit(folder / "tokenizer_config.json", chat_template="{{ 'stale' }}")


def quantised(folder: Path, dtype: str, suffix: str = "") -> None:
    """Make a matrix one of bytes, with the scales of bitsandbytes beside it."""
    with edited_weights(folder / FIRST) as (header, data):
        name = next(name for name in header if name.endswith("o_proj.weight"))
        header[name] |= {"dtype": dtype, "shape": [64, 128]}
        if suffix:
            scales = {"dtype": "F32", "shape": [64], "data_offsets": [len(data), len(data) + 256]}
            header[name.removesuffix("weight") + suffix] = scales
            data.extend(bytes(256))
    config(folder, quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})


def moved_into(folder: Path, pattern: str, *names: str) -> None:
    """Move files into folders within, beside others that have such files too."""
    for name in names:
        (folder / name).mkdir()
    for path in folder.glob(pattern):
        for name in names:
            shutil.copy(path, folder / name)
        path.unlink()


def other_words(folder: Path) -> None:
    """Leave no token of Phi-3's chat, as in a model with a vocabulary of its own."""
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        text(folder, name, (folder / name).read_text(encoding="utf-8").replace("<|end|>", "<|eot|>"))


def utf16(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_text(encoding="utf-8").encode("utf-16"))
