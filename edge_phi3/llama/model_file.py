"""A model's GGUF before llama.cpp sees it: of the family, and with numbers that a model can have.

llama.cpp believes most of what a file says, and ends the process, or never comes back, where that makes no sense. What
is refused here has a sentence of its own; for the rest see `edge_phi3.llama.proof`.
"""

import collections
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from edge_phi3 import byte_level
from edge_phi3.gguf_file import GgufError, GgufFile, read_gguf
from edge_phi3.llama import ModelLoadError

VOCABULARIES = ("llama", byte_level.MODEL)
"""The kinds of vocabularies (``tokenizer.ggml.model``) that can be served."""

_LARGEST = (1 << 31) - 1
_RANGES: dict[str, tuple[float, float]] = {
    "context_length": (8, _LARGEST),
    "embedding_length": (1, 1 << 20),
    "feed_forward_length": (1, 1 << 24),
    "block_count": (1, 512),  # LLAMA_MAX_LAYERS
    "attention.head_count": (1, 1 << 16),
    "attention.head_count_kv": (1, 1 << 16),
    "attention.layer_norm_rms_epsilon": (1e-30, 1.0),
    "attention.sliding_window": (0, _LARGEST),
    "rope.dimension_count": (2, 1 << 16),
    "rope.freq_base": (1e-30, 1e30),
    "rope.scaling.original_context_length": (0, _LARGEST),
    "rope.scaling.attn_factor": (1e-30, 1e30),
}
"""What the keys of ``phi3.`` may be."""
_SMALLEST_WINDOW = 8


class _Added(msgspec.Struct):
    """One of ``edge_phi3.tokenizer.added_tokens``."""

    id: Annotated[int, msgspec.Meta(ge=0)]
    content: Annotated[str, msgspec.Meta(min_length=1)]


def read_model_file(path: Path, *, planned: bool = False) -> GgufFile:
    """Read and check the header of a model's GGUF; what is only `planned` may be without a vocabulary.

    Raises:
        ModelLoadError: it cannot be read, is damaged or nonsense, or of another architecture or vocabulary.
    """
    try:
        header = read_gguf(path)
    except FileNotFoundError:
        raise ModelLoadError(f"There is no model file {path}.") from None
    except OSError as error:
        raise ModelLoadError(f"The model {path} cannot be read: {error.strerror}.") from None
    except GgufError as error:
        raise ModelLoadError(f"The model {path} cannot be loaded: {error}.") from None
    values = header.values
    architecture, vocabulary = values.get("general.architecture"), values.get("tokenizer.ggml.model")
    if values.get("general.type") == "adapter":
        raise ModelLoadError(f"{path} is an adapter, not a whole model: serve it beside its model with --lora.")
    if architecture != "phi3":
        raise ModelLoadError(f"{path} is a model of architecture {architecture!r}; edge-phi3 serves 'phi3' only.")
    if not planned and vocabulary not in VOCABULARIES:
        raise ModelLoadError(
            f"{path} has a {vocabulary!r} vocabulary; edge-phi3 serves {' and '.join(VOCABULARIES)},"
            " SentencePiece's and byte-level ones."
        )
    if found := _nonsense(values) or (not planned and _vocabulary_nonsense(values)):
        raise ModelLoadError(f"The model {path} cannot be loaded: {found}.")
    return header


def _nonsense(values: dict[str, Any]) -> str:
    """Return what is wrong with the hyper-parameters, the empty text if nothing is."""
    stated = {name: value for name in _RANGES if (value := values.get(f"phi3.{name}")) is not None}
    for name, value in stated.items():
        least, most = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            return f"phi3.{name} is {value!r:.80}, and must be a number from {least} to {most}"
    width, heads = stated.get("embedding_length", 1), stated.get("attention.head_count", 1)
    if width % heads or heads % stated.get("attention.head_count_kv", heads):
        return "its attention heads cannot share phi3.embedding_length, or its key-value heads"
    rotated = stated.get("rope.dimension_count", 2)
    if rotated % 2 or rotated > width // heads:
        return f"phi3.rope.dimension_count is {rotated}, and must be even and at most a head's {width // heads}"
    if 0 < stated.get("attention.sliding_window", 0) < _SMALLEST_WINDOW:
        return f"phi3.attention.sliding_window is below {_SMALLEST_WINDOW}, but not 0 for none"
    return ""


def _vocabulary_nonsense(values: dict[str, Any]) -> str:
    tokens = values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        return "tokenizer.ggml.tokens is no list of texts"
    # llama.cpp's texts end at a NUL, and empty ones get names.
    whole = [text for token in tokens if (text := token.partition("\0")[0])]
    if len(set(whole)) < len(whole):
        twice = collections.Counter(whole).most_common(1)[0][0]
        return f"its vocabulary has the token {twice!r:.80} twice"
    for name in ("scores", "token_type"):
        found = values.get(f"tokenizer.ggml.{name}")
        if found is None:
            continue
        if not isinstance(found, np.ndarray) or len(found) != len(tokens) or np.isnan(found).any():
            return f"tokenizer.ggml.{name} does not have a number for each token"
    if not isinstance(values.get("tokenizer.ggml.merges", []), list):
        return "tokenizer.ggml.merges is no list of texts"
    if values.get("edge_phi3.tokenizer.prefix", "prepend") not in {"prepend", "always", "first", "never"}:
        return "edge_phi3.tokenizer.prefix is none that is known"
    try:
        added = msgspec.json.decode(values.get("edge_phi3.tokenizer.added_tokens", "") or "[]", type=list[_Added])
    except (msgspec.MsgspecError, RecursionError, TypeError, UnicodeError) as error:
        return f"edge_phi3.tokenizer.added_tokens makes no sense ({error})"
    if any(token.id >= len(tokens) for token in added):
        return f"edge_phi3.tokenizer.added_tokens has a token beyond the {len(tokens)} that there are"
    return ""
