"""What llama.cpp's own converter and quantiser made, in digests: their inputs, and how a file is described.

``converter.json`` and ``quantized.json`` hold the digests; ``tests/parity`` records them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix_file import Imatrix, ImatrixEntry, write_imatrix
from edge_phi3.demo import DEMO_CHECKPOINT
from tests.golden.checkpoints import long_context, longrope, write_checkpoint
from tests.golden.family import FAMILY
from tests.support.cases import tables

CONVERTED = Path(__file__).with_name("converter.json")
QUANTIZED = Path(__file__).with_name("quantized.json")

QUANTIZED_TYPES = dict.fromkeys(("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS"), False) | {"IQ2_XS": True}
"""Each file type, and whether it is made with the importance matrix."""

_OURS_ALONE = ("edge_phi3.", "tokenizer.ggml.eom_token_id", "tokenizer.ggml.eot_token_id")
"""Prefixes of the metadata keys that llama.cpp's converter does not write."""

_LONG = longrope(16)
_PARAMETERS = _LONG | {"rope_theta": 10000.0, "original_max_position_embeddings": 4096, "rope_type": "longrope"}
del _PARAMETERS["type"]

CONVERTER_CASES: dict[str, dict[str, Any]] = {
    **tables(__file__)["CONVERTER_CASES"],
    "128k": long_context(),
    "128k-su": long_context() | {"rope_scaling": _LONG | {"type": "su"}},
    "128k-yarn": long_context() | {"rope_scaling": _LONG | {"type": "yarn"}},
    "128k-rope_parameters": long_context() | {"rope_scaling": None, "rope_parameters": _PARAMETERS},
    "gqa-128k-sharded": {"kv_heads": 2, "shards": 3, **long_context()},
    # The others of the family; sizes, positions and vocabulary of each.
    **{name: FAMILY[name] | {"layers": 1} for name in FAMILY if "mini-4k" not in name and "mini-128k" not in name},
}
"""Every layout, dtype and spelling that the converter knows: arguments of `write_checkpoint` by name."""

Description = dict[str, dict[str, str]]
"""``tensors`` and ``metadata``, each a text for each name."""


def write_converter_case(folder: Path, name: str) -> Path:
    """Write the checkpoint of a case into a folder of its name in `folder`."""
    return write_checkpoint(folder / name, seed=3, **{"layers": 1, "dtype": "bfloat16", **CONVERTER_CASES[name]})


def describe(path: Path) -> Description:
    """Return the tensors of a GGUF (type, shape, SHA-256 of the bytes) and its metadata but for ``general.*``.

    Digests are cut to 64 bits, and long metadata values given as digests.
    """
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        shape = "x".join(str(int(length)) for length in tensor.shape)
        tensors[tensor.name] = f"{tensor.tensor_type.name} {shape} {_short_digest(tensor.data.tobytes())}"
    metadata = {}
    for key, field in reader.fields.items():
        if not key.startswith(("general.", "GGUF.")):
            text = json.dumps([[int(kind) for kind in field.types], field.contents()])
            metadata[key] = text if len(text) < 60 else _short_digest(text.encode())
    return {"tensors": tensors, "metadata": metadata}


def _short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def differences(expected: Description, found: Description) -> list[str]:
    """Return the names of the tensors and metadata keys in which two descriptions differ, ours alone left out."""
    names = []
    for part in ("tensors", "metadata"):
        ours = {name: value for name, value in found[part].items() if not name.startswith(_OURS_ALONE)}
        either = expected[part].keys() | ours.keys()
        names += [name for name in sorted(either) if expected[part].get(name) != ours.get(name)]
    return names


def write_quantizer_inputs(folder: Path) -> tuple[Path, Path]:
    """Write the demo model in BF16 and a random importance matrix for it; return their paths."""
    model = convert(DEMO_CHECKPOINT, folder / "demo-bf16.gguf", outtype="bf16").path
    return model, write_matrix(folder / "imatrix.gguf", model)


def write_matrix(path: Path, model: Path) -> Path:
    random = np.random.default_rng(11)
    entries = {}
    for tensor in sorted(gguf.GGUFReader(model).tensors, key=lambda tensor: tensor.name):
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            # Multiples of a sixteenth: the same on every machine.
            sums = np.floor(random.random((1, int(tensor.shape[0]))) * 2**16).astype(np.float32) / 16 + 1
            entries[tensor.name] = ImatrixEntry(sums.astype(np.float32), np.array([512], np.float32))
    write_imatrix(path, Imatrix(entries, ["random"], 1, 512), force=True)
    return path


def digest(path: Path) -> str:
    """Hash names, types and bytes of a file's tensors, in the order of names."""
    found = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        found.update(f"{tensor.name} {tensor.tensor_type.name} {list(map(int, tensor.shape))}\n".encode())
        found.update(tensor.data.tobytes())
    return found.hexdigest()
