"""Models for benchmarks and comparisons: made from a seed the first time, and kept in a cache folder; adapters."""

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.golden.checkpoints import Tensor, long_context, phi3_tensors, write_checkpoint, write_safetensors
from tests.golden.vocabularies import phi3_vocabulary
from tests.support.cases import tables
from tests.support.peers import CACHE

PHI3_VOCABULARY_ROWS = 32064
SAVED = Path(__file__).parent.parent / "data" / "transformers-5"
"""What transformers 5 saved of four models, without what makes them large."""

SHAPES: dict[str, dict[str, int]] = tables(__file__)["SHAPES"]
"""Random checkpoints with Phi-3's whole vocabulary, by name."""

RANK = 2
Factors = tuple[NDArray[np.float32], NDArray[np.float32]]
"""What an adapter changes a matrix by: A, shape ``(rank, columns)``, and B, shape ``(rows, rank)``."""


def model_path(name: str, folder: Path = CACHE, kind: str | None = None) -> Path:
    """Return the GGUF of one of `SHAPES`, or of the bundled model "demo", made when it is not there yet.

    Its kind is F32, F16, BF16 or a quantisation type; None for what is measured: Q4_K_M, but F32 of the smallest.
    """
    kind = kind or ("F32" if name == "18m" else "Q4_K_M")
    path = folder / f"{name}-{kind}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    plain = kind if kind in {"F32", "F16", "BF16"} else "F16"
    if plain != kind:
        return quantize(model_path(name, folder, plain), path, type=kind).path
    if name == "demo":
        return convert(DEMO_CHECKPOINT, path, outtype=plain.lower()).path
    with random_checkpoint(name, folder, dtype="float32" if plain == "F32" else "bfloat16") as checkpoint:
        return convert(checkpoint, path, outtype=plain.lower()).path


@contextlib.contextmanager
def random_checkpoint(name: str, folder: Path | None = None, dtype: str = "bfloat16") -> Iterator[Path]:
    """Write one of `SHAPES` as a checkpoint, the same each time, for as long as the context lasts."""
    checkpoint = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield write_random_checkpoint(checkpoint, name, dtype=dtype)
    finally:
        shutil.rmtree(checkpoint)


def write_random_checkpoint(folder: Path, name: str, *, dtype: str = "bfloat16", shards: int = 1) -> Path:
    """Write one of `SHAPES` as a checkpoint into `folder`, and return it."""
    options: dict[str, Any] = {"vocabulary": phi3_vocabulary(), "vocab_size": PHI3_VOCABULARY_ROWS, **SHAPES[name]}
    return write_checkpoint(folder, dtype=dtype, shards=shards, **options)


def write_fine_tune(folder: Path, kind: str = "phi3") -> Path:
    """Write what transformers 5 saved of the demo model (``tests/data/README.md``) into `folder`, and return it."""
    shutil.copytree(SAVED / kind, folder)
    shutil.copy(DEMO_CHECKPOINT / "model.safetensors", folder)
    tokenizer, original = (
        json.loads((place / "tokenizer.json").read_text(encoding="utf-8")) for place in (folder, DEMO_CHECKPOINT)
    )
    tokenizer["model"] |= {name: original["model"][name] for name in ("vocab", "merges")}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def make_128k(config: Path) -> None:
    """Change a 4k checkpoint's ``config.json`` to that of a 128k one: all that tells them apart but the weights."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values |= long_context(values["hidden_size"] // values["num_attention_heads"])
    config.unlink()  # it may be a hard link, whose other name must not change
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split(source: Path, folder: Path) -> list[Path]:
    """Write an unquantised GGUF in parts of five tensors each; return them in order."""
    writer, reader = gguf.GGUFWriter(folder / "model.gguf", "phi3", split_max_tensors=5), gguf.GGUFReader(source)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    _write(writer)
    return sorted(folder.glob("model-*.gguf"))


def write_adapter(path: Path, factors: Mapping[str, Factors], invocation: Sequence[int] = ()) -> Path:
    """Write an adapter that adds ``B A`` to each of some matrices of a model; behind `invocation`, if that is given."""
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(RANK))
    if invocation:
        kinds = gguf.GGUFValueType
        writer.add_key_value("adapter.alora.invocation_tokens", [*invocation], kinds.ARRAY, sub_type=kinds.UINT32)
    for name, (down, up) in factors.items():
        writer.add_tensor(f"{name}.lora_a", down)
        writer.add_tensor(f"{name}.lora_b", up)
    _write(writer)
    return path


def random_adapter(path: Path, model: Path, seed: int) -> Path:
    """Write an adapter, from a seed, that changes each block's queries, keys, values, and its way out."""
    chance, factors = np.random.default_rng(seed), dict[str, Factors]()
    for tensor in gguf.GGUFReader(model).tensors:
        columns, rows = (*tensor.shape.tolist(), 0)[:2]
        if tensor.name.endswith(("attn_qkv.weight", "ffn_down.weight")):
            down, up = chance.standard_normal((RANK, columns)), chance.standard_normal((rows, RANK))
            factors[tensor.name] = ((down / columns**0.5).astype(np.float32), up.astype(np.float32))
    return write_adapter(path, factors)


def adapter_arguments(model: Path, count: int) -> list[str]:
    """Make so many adapters of a model, and return the arguments of ``edge-phi3 serve`` for them, called 1, 2, ..."""
    paths = [model.with_name(f"{model.stem} {number}") for number in range(1, count + 1)]
    made = enumerate((random_adapter(path, model, number) for number, path in enumerate(paths, 1)), 1)
    return [word for number, path in made for word in ("--lora", f"{number}={path}")]


_WIDTH = 512
"""Numbers of the embedding of a token, +1 or -1 each; as many hold the token before, and what is to come."""
_NOW, _CONSTANT, _BEFORE, _NEXT = 0, _WIDTH, 2 * _WIDTH, 3 * _WIDTH
"""Where these begin in the residual stream; the constant is 1 for every token."""
_NEAREST = 70.0
_ALIKE = 40.0
"""How sharply heads of the first and of the second layer tell what they look for from the rest."""


@dataclasses.dataclass(frozen=True)
class _CopyingTensor(Tensor):
    """One weight of a model that goes on as the text went on the last times that its newest token occurred.

    It is an induction head (Olsson et al., https://arxiv.org/abs/2209.11895) in Phi-3's architecture. The first layer's
    heads look at the token before, whose embedding they add to the residual stream; the second's look for tokens whose
    predecessor is the newest token, and add their embeddings, which the output reads. All other weights are zero.
    """

    heads: int = 1
    hidden: int = 1

    def values(self, seed: int) -> NDArray[np.float32]:
        made = np.zeros(self.shape, np.float32)
        chance = np.random.default_rng(seed)
        signs = chance.choice(np.array([-1, 1], np.float32), (max(self.shape), _WIDTH))
        if self.name.endswith("norm.weight"):
            made[:] = 1
        elif self.name.startswith("model.embed"):
            made[:, :_WIDTH], made[:, _CONSTANT] = signs[: len(made)], 1
        elif self.name.startswith("lm_head"):
            made[:, _NEXT : _NEXT + _WIDTH] = signs[: len(made)]
        elif ".layers.0.self_attn" in self.name or ".layers.1.self_attn" in self.name:
            self._attention(made, chance, first=".layers.0." in self.name)
        return made

    def _attention(self, made: NDArray[np.float32], chance: np.random.Generator, *, first: bool) -> None:
        size, part = self.hidden // self.heads, _WIDTH // self.heads
        target = _BEFORE if first else _NEXT
        # Rotary pairs are numbers i and i + size / 2 of a head, and turn by 10000 ** (-2 i / size) a position.
        half = size // 2
        turns = 10000.0 ** (-np.arange(half) / half)
        for head in range(self.heads):
            query, key, value = (made[at + head * size :][:size] for at in (0, self.hidden, 2 * self.hidden))
            if self.name.endswith("o_proj.weight"):
                rows = slice(target + head * part, target + (head + 1) * part)
                made[rows, head * size : head * size + part] = np.eye(part)
                continue
            value[:part, _NOW + head * part : _NOW + (head + 1) * part] = np.eye(part)
            if first:
                key[:half, _CONSTANT] = 1  # of all keys the one before agrees best with a query turned back by one
                query[:half, _CONSTANT] = _NEAREST * np.cos(turns)
                query[half:, _CONSTANT] = -_NEAREST * np.sin(turns)
            else:
                slow = np.flatnonzero(turns < 1e-3)
                mixed = chance.normal(size=(2 * len(slow), _WIDTH)) / math.sqrt(_WIDTH)
                places = np.concatenate([slow, slow + half])
                query[places, _NOW : _NOW + _WIDTH] = _ALIKE * mixed
                key[places, _BEFORE : _BEFORE + _WIDTH] = mixed


def write_copying_checkpoint(folder: Path, *, hidden_size: int, heads: int, **options: Any) -> Path:
    """Write the model as a checkpoint with its tokenizer; the options are those of ``write_checkpoint``."""
    write_checkpoint(folder, hidden_size=hidden_size, heads=heads, **options)
    sizes = {name: options[name] for name in ("intermediate_size", "layers")}
    rows = options["vocab_size"]
    shapes = phi3_tensors(hidden_size, heads=heads, kv_heads=heads, rows=rows, gain=1.0, **sizes)
    tensors: list[Tensor] = [_CopyingTensor(each.name, each.shape, 0.0, 0.0, heads, hidden_size) for each in shapes]
    write_safetensors(folder / "model.safetensors", tensors, seed=7, dtype=options.get("dtype", "float32"))
    return folder
