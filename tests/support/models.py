"""Models for benchmarks and comparisons: made from a seed the first time, and kept in a cache folder; adapters."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.golden.checkpoints import long_context, write_checkpoint
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


def write_adapter(path: Path, factors: Mapping[str, Factors]) -> Path:
    """Write an adapter that adds ``B A`` to each of some matrices of a model."""
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(RANK))
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
