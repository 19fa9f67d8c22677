"""A GGUF in a few kilobytes: what two converters must agree on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gguf import GGUFReader

OURS_ALONE = ("edge_phi3.", "tokenizer.ggml.eom_token_id", "tokenizer.ggml.eot_token_id")
"""Prefixes of the metadata keys that llama.cpp's converter does not write."""

Description = dict[str, dict[str, str]]
"""``tensors`` and ``metadata``, each a text for each name."""


def describe(path: Path) -> Description:
    """Return the tensors of a GGUF (type, shape, SHA-256 of the bytes) and its metadata but for ``general.*``.

    Digests are cut to 64 bits, and long metadata values given as digests.
    """
    reader = GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        shape = "x".join(str(int(length)) for length in tensor.shape)
        tensors[tensor.name] = f"{tensor.tensor_type.name} {shape} {_digest(tensor.data.tobytes())}"
    metadata = {}
    for key, field in reader.fields.items():
        if not key.startswith(("general.", "GGUF.")):
            text = json.dumps([[int(kind) for kind in field.types], field.contents()])
            metadata[key] = text if len(text) < 60 else _digest(text.encode())
    return {"tensors": tensors, "metadata": metadata}


def differences(expected: Description, found: Description) -> list[str]:
    """Return the names of the tensors and metadata keys in which two descriptions differ, ours alone left out."""
    names = []
    for part in ("tensors", "metadata"):
        ours = {name: value for name, value in found[part].items() if not name.startswith(OURS_ALONE)}
        either = expected[part].keys() | ours.keys()
        names += [name for name in sorted(either) if expected[part].get(name) != ours.get(name)]
    return names


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
