"""What llama-quantize made of a model, in digests: the cases, and how a file is described."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import numpy as np

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix_file import Imatrix, ImatrixEntry, write_imatrix
from edge_phi3.demo import DEMO_CHECKPOINT

RECORD = Path(__file__).with_name("quantized.json")

CASES = {
    "Q4_0": False,
    "Q4_K_M": False,
    "Q5_K_M": False,
    "Q6_K": False,
    "Q8_0": False,
    "IQ4_XS": False,
    "IQ2_XS": True,
}
"""Each file type, and whether it is made with the importance matrix."""


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write the demo model in BF16 and a random importance matrix for it; give their paths."""
    model = folder / "demo-bf16.gguf"
    convert(DEMO_CHECKPOINT, model, outtype="bf16", force=True)
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
