"""Phi-3 GGUF files for the quantiser's tests: random weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from edge_phi3.conversion.phi3 import ARCHITECTURE, Phi3, read_phi3


def small_phi3(
    *, layers: int = 2, hidden: int = 256, heads: int = 4, feed_forward: int = 512, vocabulary: int = 384
) -> Phi3:
    """Return the hyper-parameters of a small Phi-3 without grouped-query attention."""
    return read_phi3(
        {
            "architectures": [ARCHITECTURE],
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": feed_forward,
            "vocab_size": vocabulary,
        }
    )


def write_random(path: Path, *, split_max_tensors: int = 0, **shape: int) -> None:
    """Write a small Phi-3 of random weights; matrices in F16, norms in F32."""
    model = small_phi3(**shape)
    writer = gguf.GGUFWriter(path, "phi3", split_max_tensors=split_max_tensors)
    model.write_metadata(writer)
    writer.add_vocab_size(model.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    random = np.random.default_rng(0)
    for spec in model.tensors().values():
        values = random.normal(size=spec.shape, scale=0.02)
        writer.add_tensor(spec.name, values.astype(np.float16 if len(spec.shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
