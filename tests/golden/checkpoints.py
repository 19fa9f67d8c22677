"""Small random Phi-3 checkpoints in the Hugging Face layout, from a seed, with NumPy alone.

The same call writes the same bytes on every machine: weights are uniform numbers made of the raw bits of
PCG64, whose stream NumPy guarantees, and need no function of libm. So golden data (made with torch and
transformers) and the tests that use it (which have neither) work on one checkpoint that is stored nowhere.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.demo import DEMO_CHECKPOINT
from tests.golden.byte_level import ByteLevelVocabulary
from tests.golden.vocabularies import Vocabulary, phi3_vocabulary, write_tokenizer

_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
"""What safetensors calls an element type, and its bytes."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One weight: its name in the checkpoint, its shape, and the distribution of its values."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    def values(self, seed: int) -> NDArray[np.float32]:
        """Return the values, float32 of `shape`: uniform around `mean` with standard deviation `std`."""
        raw = np.random.PCG64([seed, zlib.crc32(self.name.encode())]).random_raw(math.prod(self.shape))
        unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1.0)
        values = unit * np.float32(self.std * math.sqrt(3.0)) + np.float32(self.mean)
        return values.reshape(self.shape)


def longrope(head_size: int) -> dict[str, Any]:
    """Return a `rope_scaling` shaped like that of Phi-3-mini-128k: short factors near 1, long ones up to 60."""
    pairs = head_size // 2
    return {
        "type": "longrope",
        "short_factor": [round(1.0 + 0.5 * i / pairs, 4) for i in range(pairs)],
        "long_factor": [round(1.0 + 59.0 * (i / (pairs - 1)) ** 2, 4) for i in range(pairs)],
    }


def long_context(head_size: int = 16) -> dict[str, Any]:
    """Return what tells Phi-3-mini-128k from the 4k model in ``config.json``, as arguments of `write_checkpoint`."""
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144}
    return lengths | {"rope_scaling": longrope(head_size)}


def write_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    intermediate_size: int = 160,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    vocab_size: int | None = None,
    dtype: str = "float32",
    shards: int = 1,
    gain: float = 1.5,
    vocabulary: Vocabulary | ByteLevelVocabulary | None = None,
    add_bos: bool = False,
    **config: Any,
) -> Path:
    """Write a random Phi-3 checkpoint with its tokenizer into `folder`, made when absent, and return it.

    `config` replaces or extends entries of ``config.json``; the others are those of Phi-3-mini-4k. A tensor depends on
    the seed and its name only, so sharding changes no value. The vocabulary is by default that of Phi-3 cut down to 300
    merges, and the rows of the embedding its length rounded up to a multiple of 32.

    `gain` is the standard deviation of a matrix times the square root of its columns: logits then spread like `gain`
    times a unit normal, and their order is decided far above rounding errors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = vocabulary or phi3_vocabulary(merges=300)
    rows = vocab_size or -(-len(vocabulary) // 32) * 32
    kv_heads = kv_heads or heads
    end = vocabulary.id_of("<|endoftext|>")
    stated: dict[str, Any] = {"eos_token_id": end, "pad_token_id": end, "torch_dtype": dtype, "vocab_size": rows}
    stated |= {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    stated |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, **config}
    hf_config = json.loads((DEMO_CHECKPOINT / "config.json").read_text(encoding="utf-8")) | stated
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    if isinstance(vocabulary, Vocabulary):
        write_tokenizer(folder, vocabulary, add_bos=add_bos)
    else:
        vocabulary.write(folder)
    tensors = list(
        phi3_tensors(hidden_size, intermediate_size, layers, heads=heads, kv_heads=kv_heads, rows=rows, gain=gain)
    )
    if hf_config["tie_word_embeddings"]:
        # As transformers saves it: the output matrix is the embedding, which is stored once.
        tensors.pop()
    write_weights(folder, tensors, seed=seed, dtype=dtype, shards=shards)
    return folder


def phi3_tensors(
    hidden_size: int, intermediate_size: int, layers: int, *, heads: int, kv_heads: int, rows: int, gain: float
) -> Iterator[Tensor]:
    """Return the tensors of ``Phi3ForCausalLM`` in the order of ``state_dict()``."""
    head_size = hidden_size // heads
    qkv = (heads + 2 * kv_heads) * head_size
    wide, narrow = gain / math.sqrt(hidden_size), gain / math.sqrt(intermediate_size)
    yield Tensor("model.embed_tokens.weight", (rows, hidden_size), 1.0)
    for i in range(layers):
        block = f"model.layers.{i}"
        yield Tensor(f"{block}.self_attn.o_proj.weight", (hidden_size, hidden_size), wide)
        yield Tensor(f"{block}.self_attn.qkv_proj.weight", (qkv, hidden_size), wide)
        yield Tensor(f"{block}.mlp.gate_up_proj.weight", (2 * intermediate_size, hidden_size), wide)
        yield Tensor(f"{block}.mlp.down_proj.weight", (hidden_size, intermediate_size), narrow)
        yield Tensor(f"{block}.input_layernorm.weight", (hidden_size,), 0.1, 1.0)
        yield Tensor(f"{block}.post_attention_layernorm.weight", (hidden_size,), 0.1, 1.0)
    yield Tensor("model.norm.weight", (hidden_size,), 0.1, 1.0)
    yield Tensor("lm_head.weight", (rows, hidden_size), wide)


def write_weights(folder: Path, tensors: list[Tensor], *, seed: int, dtype: str, shards: int = 1) -> None:
    """Write `tensors` as ``model.safetensors``, or as `shards` files and ``model.safetensors.index.json``."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, seed=seed, dtype=dtype)
        return
    weight_map = {}
    for i, part in enumerate(np.array_split(np.arange(len(tensors)), shards)):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / name, [tensors[j] for j in part], seed=seed, dtype=dtype)
        weight_map.update({tensors[j].name: name for j in part})
    size = sum(math.prod(tensor.shape) for tensor in tensors) * _DTYPES[dtype][1]
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: list[Tensor], *, seed: int, dtype: str) -> None:
    name, item_size = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * item_size
        header[tensor.name] = {"dtype": name, "shape": tensor.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            file.write(_encode(tensor.values(seed), dtype).tobytes())


def _encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype)
