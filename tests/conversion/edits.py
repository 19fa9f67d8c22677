"""What people's tools do to a checkpoint: edits of one with one layer, two shards, and two key heads for four heads."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.conversion.conftest import edit, edited_weights

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"
GHOST = "model.layers.0.self_attn.rotary_emb.inv_freq"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LEFT_OVER = {"load_in_4bit": True, "quant_method": "bitsandbytes"}

Edit = Callable[[Path], object]


def each(*edits: Edit) -> Edit:
    def apply(folder: Path) -> None:
        for one in edits:
            one(folder)

    return apply


def removed(*names: str) -> Edit:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def written(name: str) -> Edit:
    return lambda folder: (folder / name).write_bytes(b"x")


def config(**entries: Any) -> Edit:
    return lambda folder: edit(folder / "config.json", **entries)


def shards(folder: Path) -> Iterator[tuple[dict[str, Any], bytearray]]:
    """Yield header and data of each shard to be changed, and make the index of what came out."""
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with edited_weights(path) as (header, data):
            yield header, data
            weight_map |= dict.fromkeys(header.keys() - {"__metadata__"}, path.name)
    if (folder / INDEX).exists():
        edit(folder / INDEX, weight_map=weight_map)


def renamed(rename: Callable[[str], str]) -> Edit:
    def apply(folder: Path) -> None:
        for header, _ in shards(folder):
            entries = {rename(name): header.pop(name) for name in list(header) if name != "__metadata__"}
            header.update(entries)

    return apply


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


def split_as(**entries: Any) -> Edit:
    return each(split, config(**entries))


def index(change: Callable[[dict[str, str]], dict[str, str]]) -> Edit:
    def apply(folder: Path) -> None:
        found = json.loads((folder / INDEX).read_text())["weight_map"]
        edit(folder / INDEX, weight_map=change(found))

    return apply


def without_index(*names: str) -> Edit:
    """Remove the index, and call the shards so."""

    def apply(folder: Path) -> None:
        (folder / INDEX).unlink()
        for old, new in zip((FIRST, SECOND), names, strict=True):
            (folder / old).rename(folder / new)

    return apply


def one_shard(folder: Path) -> None:
    headers: dict[str, Any] = {}
    data = bytearray()
    for header, content in shards(folder):
        for entry in (entry for name, entry in header.items() if name != "__metadata__"):
            entry["data_offsets"] = [offset + len(data) for offset in entry["data_offsets"]]
        headers |= header
        data += content
    (folder / SECOND).unlink()
    (folder / INDEX).unlink()
    encoded = json.dumps(headers).encode()
    (folder / FIRST).unlink()
    (folder / "model-00001-of-00001.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def twice(folder: Path, change: int = 0) -> None:
    """Store a norm of the second shard at the end of the first as well."""
    with edited_weights(folder / SECOND) as (header, data):
        begin, end = header[NORM]["data_offsets"]
        entry, norm = header[NORM], data[begin:end]
    norm[0] ^= change
    with edited_weights(folder / FIRST) as (header, data):
        header[NORM] = entry | {"data_offsets": [len(data), len(data) + len(norm)]}
        data.extend(norm)


def buffers(folder: Path) -> None:
    with edited_weights(folder / SECOND) as (header, data):
        for name in (GHOST, "model.rotary_emb.original_inv_freq", "v_head.summary.bias"):
            header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
            data.extend(bytes(8))


def stored_anew(change: Callable[[str, dict[str, Any], bytes], bytes]) -> Edit:
    """Store what `change` makes of each tensor's name, entry and values."""

    def apply(folder: Path) -> None:
        for header, data in shards(folder):
            before = bytes(data)
            data.clear()
            for name in header.keys() - {"__metadata__"}:
                begin, end = header[name]["data_offsets"]
                values = change(name, header[name], before[begin:end])
                header[name]["data_offsets"] = [len(data), len(data) + len(values)]
                data.extend(values)

    return apply


def widened(wanted: str) -> Edit:
    """Store what has this in its name in float32."""

    def change(name: str, entry: dict[str, Any], values: bytes) -> bytes:
        if wanted not in name:
            return values
        entry["dtype"] = "F32"
        return (np.frombuffer(values, "<u2").astype("<u4") << 16).astype("<u4").tobytes()

    return stored_anew(change)


def ungathered(name: str, entry: dict[str, Any], values: bytes) -> bytes:
    """Leave of a norm what DeepSpeed does where it gathers no weights."""
    entry["shape"] = [0] if name == NORM else entry["shape"]
    return b"" if name == NORM else values


def marked(folder: Path) -> None:
    for path in [*folder.glob("*.json"), folder / "README.md"]:
        path.write_bytes(b"\xef\xbb\xbf" + (path.read_bytes() if path.exists() else b"# A model"))


def template_file(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "chat_template.jinja").write_text(content["chat_template"], encoding="utf-8")
    edit(folder / "tokenizer_config.json", chat_template="{{ 'stale' }}")


def quantised(dtype: str, suffix: str = "") -> Edit:
    """Make a matrix one of bytes, with the scales of bitsandbytes beside it."""

    def apply(folder: Path) -> None:
        with edited_weights(folder / FIRST) as (header, data):
            name = next(name for name in header if name.endswith("o_proj.weight"))
            header[name] |= {"dtype": dtype, "shape": [64, 128]}
            if suffix:
                header[name.removesuffix("weight") + suffix] = {
                    "dtype": "F32", "shape": [64], "data_offsets": [len(data), len(data) + 256],
                }  # fmt: skip
                data.extend(bytes(256))
        edit(folder / "config.json", quantization_config=LEFT_OVER)

    return apply


def only(name: str) -> Edit:
    """Leave no weights but a file of this name."""

    def apply(folder: Path) -> None:
        for path in [*folder.glob("*.safetensors*")]:
            path.unlink()
        (folder / name).write_bytes(b"x")

    return apply


def adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def stated(**entries: Any) -> Edit:
    """Change config.json, and leave no generation_config.json that would go before it."""
    return each(config(**entries), removed("generation_config.json"))


def moved_into(pattern: str, *names: str) -> Edit:
    """Move files into a folder within, beside others that have such files too."""

    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).mkdir()
        for path in folder.glob(pattern):
            for name in names:
                shutil.copy(path, folder / name)
            path.unlink()

    return apply


def real(kind: str) -> Edit:
    """Make it what it would be with a vocabulary of its own: no token of Phi-3's chat."""

    def apply(folder: Path) -> None:
        split_as(**(LLAMA if kind == "llama" else MISTRAL), sliding_window=None)(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
            text = (folder / name).read_text(encoding="utf-8")
            (folder / name).write_text(text.replace("<|end|>", "<|eot|>"), encoding="utf-8")

    return apply


def utf16(name: str) -> Edit:
    return lambda f: (f / name).write_bytes((f / name).read_text(encoding="utf-8").encode("utf-16"))


def merge_adapter(name: str) -> str:
    return name.replace("o_proj.weight", "o_proj.lora_A.default.weight")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer.*"):
        path.unlink()
