"""Whether the output matrix is the embedding: what ``config.json`` says, against what is stored.

As in transformers 5, an ``lm_head.weight`` that is stored beside the embedding and differs from it is a matrix of its
own, whatever ``tie_word_embeddings`` says; transformers 4 put the embedding in its place.
"""

from __future__ import annotations

import dataclasses

from edge_phi3.conversion.checkpoint import Checkpoint
from edge_phi3.conversion.encode import STORED_TYPES, to_float32
from edge_phi3.conversion.phi3 import EMBEDDING, HEAD, Phi3, read_phi3
from edge_phi3.conversion.safetensors import StoredTensor

# Values that are compared at once.
_CHUNK = 1 << 20


def read_model(checkpoint: Checkpoint) -> Phi3:
    """Give the hyper-parameters of a checkpoint, untied where its output matrix is not the embedding.

    The two matrices are read, a chunk at a time, when the checkpoint says that they are one and stores both.

    Raises:
        UnsupportedModelError: the model is another one, or has a part that cannot be converted.
        CheckpointError: an entry of ``config.json`` is absent or has an impossible value.
    """
    model = read_phi3(checkpoint.config)
    embedding, head = checkpoint.tensors.get(EMBEDDING), checkpoint.tensors.get(HEAD)
    if not model.tie_word_embeddings or embedding is None or head is None or _are_equal(embedding, head):
        return model
    note = (
        f"config.json: tie_word_embeddings is true, but {HEAD} is stored and differs from {EMBEDDING}; "
        "both are kept, as in transformers 5."
    )
    return dataclasses.replace(model, tie_word_embeddings=False, notes=(*model.notes, note))


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Compare the values, which two element types may hold alike."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= STORED_TYPES.keys():
        return False
    for start in range(0, one.size, _CHUNK):
        stop = min(start + _CHUNK, one.size)
        left, right = one.read(start, stop), other.read(start, stop)
        if one.dtype != other.dtype or left.tobytes() != right.tobytes():
            same = to_float32(left, one.dtype) == to_float32(right, other.dtype)
            if not same.all():
                return False
        for tensor in (one, other):
            tensor.drop(start, stop)
    return True
