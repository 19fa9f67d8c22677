"""What people's tools do to a checkpoint: edits of one with one layer, two shards, and two key heads for four heads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from tests.conversion.conftest import edit, edited_weights

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LEFT_OVER = {"load_in_4bit": True, "quant_method": "bitsandbytes"}

Edit = Callable[[Path], object]
_Given = ParamSpec("_Given")


def editing(change: Callable[Concatenate[Path, _Given], None]) -> Callable[_Given, Edit]:
    """Make of a change of a folder what returns the edit that makes it, given all but the folder."""
    return lambda *given, **named: lambda folder: change(folder, *given, **named)


@editing
def each(folder: Path, *edits: Edit) -> None:
    for one in edits:
        one(folder)


@editing
def removed(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


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
    edit(folder / INDEX, weight_map=weight_map)


@editing
def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    for header, _ in shards(folder):
        entries = {rename(name): header.pop(name) for name in list(header) if name != "__metadata__"}
        header.update(entries)


def split(folder: Path) -> None:
    """Store q, k, v and gate, up as matrices of their own, the last first."""
    rows = {"qkv_proj": {"q_proj": 64, "k_proj": 32, "v_proj": 32}, "gate_up_proj": {"gate_proj": 160, "up_proj": 160}}
    for header, data in shards(folder):
        for name in [name for name in header if name.split(".")[-2:-1] and name.split(".")[-2] in rows]:
            entry = header.pop(name)
            begin, end = entry["data_offsets"]
            fused = bytes(data[begin:end])
            at, cut = end, 0
            for part, count in rows[name.split(".")[-2]].items():
                size = count * 64 * 2
                data[at - size : at] = fused[cut : cut + size]
                place = {"shape": [count, 64], "data_offsets": [at - size, at]}
                header[name.replace(name.split(".")[-2], part)] = entry | place
                at, cut = at - size, cut + size


def split_as(**entries: Any) -> Edit:
    return each(split, config(**entries))


@editing
def index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    found = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=change(found))


@editing
def without_index(folder: Path, *names: str) -> None:
    """Remove the index, and call the shards so."""
    (folder / INDEX).unlink()
    for old, new in zip((FIRST, SECOND), names, strict=True):
        (folder / old).rename(folder / new)


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
        for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"):
            header[name] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
            data.extend(bytes(8))


def marked(folder: Path) -> None:
    for path in [*folder.glob("*.json"), folder / "README.md"]:
        path.write_bytes(b"\xef\xbb\xbf" + (path.read_bytes() if path.exists() else b"# A model"))


def template_file(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "chat_template.jinja").write_text(content["chat_template"], encoding="utf-8")
    edit(folder / "tokenizer_config.json", chat_template="{{ 'stale' }}")


@editing
def quantised(folder: Path, dtype: str, suffix: str = "") -> None:
    """Make a matrix one of bytes, with the scales of bitsandbytes beside it."""
    with edited_weights(folder / FIRST) as (header, data):
        name = next(name for name in header if name.endswith("o_proj.weight"))
        header[name] |= {"dtype": dtype, "shape": [64, 128]}
        if suffix:
            scales = {"dtype": "F32", "shape": [64], "data_offsets": [len(data), len(data) + 256]}
            header[name.removesuffix("weight") + suffix] = scales
            data.extend(bytes(256))
    edit(folder / "config.json", quantization_config=LEFT_OVER)


@editing
def only(folder: Path, name: str) -> None:
    """Leave no weights but a file of this name."""
    for path in [*folder.glob("*.safetensors*")]:
        path.unlink()
    (folder / name).write_bytes(b"x")


def adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"x")


def stated(**entries: Any) -> Edit:
    """Change config.json, and leave no generation_config.json that would go before it."""
    return each(config(**entries), removed("generation_config.json"))


@editing
def moved_into(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / "config.json").rename(folder / name / "config.json")


@editing
def real(folder: Path, kind: str) -> None:
    """Make it what it would be with a vocabulary of its own: no token of Phi-3's chat."""
    split_as(**(LLAMA if kind == "llama" else MISTRAL), sliding_window=None)(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|end|>", "<|eot|>"), encoding="utf-8")


def utf16(name: str) -> Edit:
    return lambda f: (f / name).write_bytes((f / name).read_text(encoding="utf-8").encode("utf-16"))


def merge_adapter(name: str) -> str:
    return name.replace("o_proj.weight", "o_proj.lora_A.default.weight")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer.*"):
        path.unlink()
