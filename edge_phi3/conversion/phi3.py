"""Phi-3's hyper-parameters and tensors: what ``config.json`` says, checked, and what a GGUF calls it.

The reference is ``Phi3Config`` and ``Phi3ForCausalLM`` of transformers; the GGUF side is what llama.cpp's
converter writes and its ``phi3`` architecture reads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError

ARCHITECTURE = "Phi3ForCausalLM"

_RELATIVES = {
    "Phi3SmallForCausalLM": "Phi-3-small has block-sparse attention and a tiktoken vocabulary",
    "Phi3VForCausalLM": "Phi-3-vision has an image encoder",
    "Phi4MMForCausalLM": "Phi-4-multimodal has image and speech encoders",
    "PhiMoEForCausalLM": "Phi-3.5-MoE is a mixture of experts",
    "PhimoeForCausalLM": "Phi-3.5-MoE is a mixture of experts",
    "PhiForCausalLM": "Phi-1 and Phi-2 have other layers",
}

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp

_LONGROPE_SPELLINGS = ("longrope", "su", "yarn")

# What Phi3Config assumes for an absent entry.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}


@dataclasses.dataclass(frozen=True)
class LongRope:
    """The rope scaling of the long-context models.

    Attributes:
        short_factor: divisors of the rotary frequencies up to the original context length, float32, (head size / 2,).
        long_factor: the same beyond it.
        attention_factor: by which cosines and sines are multiplied.
    """

    short_factor: NDArray[np.float32]
    long_factor: NDArray[np.float32]
    attention_factor: float


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the checkpoint is called in the GGUF, and the shape that it must have."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Phi3:
    """Checked hyper-parameters, under the names of ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    longrope: LongRope | None
    sliding_window: int | None
    tie_word_embeddings: bool

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def tensors(self) -> dict[str, TensorSpec]:
        """Give the tensors that a checkpoint of this model has, by name."""
        width, vocabulary = self.hidden_size, self.vocab_size
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_size
        specs = {
            "model.embed_tokens.weight": TensorSpec("token_embd.weight", (vocabulary, width)),
            "model.norm.weight": TensorSpec("output_norm.weight", (width,)),
        }
        if not self.tie_word_embeddings:
            specs["lm_head.weight"] = TensorSpec("output.weight", (vocabulary, width))
        block = {
            "input_layernorm": ("attn_norm", (width,)),
            "self_attn.qkv_proj": ("attn_qkv", (qkv, width)),
            "self_attn.o_proj": ("attn_output", (width, width)),
            "post_attention_layernorm": ("ffn_norm", (width,)),
            "mlp.gate_up_proj": ("ffn_up", (2 * self.intermediate_size, width)),
            "mlp.down_proj": ("ffn_down", (width, self.intermediate_size)),
        }
        for i in range(self.num_hidden_layers):
            for theirs, (ours, shape) in block.items():
                specs[f"model.layers.{i}.{theirs}.weight"] = TensorSpec(f"blk.{i}.{ours}.weight", shape)
        return specs

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``phi3.*`` keys.

        ``phi3.attention.sliding_window`` holds the window of ``config.json``, 0 when there is none.
        llama.cpp reads the key and does not use it; the engine does.
        """
        writer.add_context_length(self.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(self.original_max_position_embeddings)
        writer.add_embedding_length(self.hidden_size)
        writer.add_feed_forward_length(self.intermediate_size)
        writer.add_block_count(self.num_hidden_layers)
        writer.add_head_count(self.num_attention_heads)
        writer.add_head_count_kv(self.num_key_value_heads)
        writer.add_layer_norm_rms_eps(self.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(self.rope_theta)
        writer.add_sliding_window(self.sliding_window or 0)
        if self.longrope is not None:
            writer.add_rope_scaling_attn_factors(self.longrope.attention_factor)


def read_phi3(config: dict[str, Any]) -> Phi3:
    """Check ``config.json`` and give its hyper-parameters.

    Raises:
        UnsupportedModelError: the model is another one, or has a part that cannot be converted.
        CheckpointError: an entry is absent or has an impossible value.
    """
    _refuse_other_models(config)
    config = {**_DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    rope = _rope_parameters(config)
    width, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    kv_heads = _integer(config, "num_key_value_heads", heads)
    if width % heads or width // heads % 2:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share a hidden_size of {width}.")
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads.")
    if _integer(config, "head_dim", width // heads) != width // heads:
        raise UnsupportedModelError(
            f"config.json: head_dim is {config['head_dim']}; hidden_size {width} has {heads} heads of {width // heads}."
        )
    context = _integer(config, "max_position_embeddings")
    original = _integer(rope, "original_max_position_embeddings", config["original_max_position_embeddings"], minimum=2)
    return Phi3(
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=width,
        intermediate_size=_integer(config, "intermediate_size"),
        num_hidden_layers=_integer(config, "num_hidden_layers", maximum=_MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        original_max_position_embeddings=original,
        rms_norm_eps=_number(config, "rms_norm_eps"),
        rope_theta=_number(rope, "rope_theta", config["rope_theta"]),
        longrope=_longrope(rope, width // heads // 2, context, original),
        sliding_window=_integer(config, "sliding_window", 0, minimum=0) or None,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _refuse_other_models(config: dict[str, Any]) -> None:
    stated = config.get("architectures")
    architectures = [str(name) for name in (stated if isinstance(stated, list) else [stated] if stated else [])]
    if architectures != [ARCHITECTURE]:
        named = f"the architecture {', '.join(architectures)}" if architectures else "no architecture"
        reason = next((f" ({_RELATIVES[name]})" for name in architectures if name in _RELATIVES), "")
        raise UnsupportedModelError(f"config.json names {named}{reason}; only {ARCHITECTURE} can be converted.")
    if config.get("quantization_config"):
        raise UnsupportedModelError("The checkpoint is quantised already; convert the original one.")
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"config.json: hidden_act is {config['hidden_act']!r}; Phi-3 has silu.")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UnsupportedModelError(f"config.json: {name} is set; llama.cpp's Phi-3 has no biases.")


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters, with what used to lie beside rope_scaling inside it.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError("config.json: rope_scaling must be an object or null.")
    partial = _number(rope, "partial_rotary_factor", config["partial_rotary_factor"])
    if partial != 1.0:
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor is {partial}, as in Phi-4-mini; only models that rotate "
            "whole heads can be converted."
        )
    return rope


def _longrope(rope: dict[str, Any], pairs: int, context: int, original: int) -> LongRope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _LONGROPE_SPELLINGS:
        raise UnsupportedModelError(
            f"config.json: the rope scaling type is {kind!r}; Phi-3 has 'longrope' ('su' in older revisions) or none."
        )
    factors = {}
    for name in ("short_factor", "long_factor"):
        values = rope.get(name)
        if not isinstance(values, list) or not all(_is_number(value) and value > 0 for value in values):
            raise CheckpointError(f"config.json: the rope scaling's {name} must be a list of positive numbers.")
        if len(values) != pairs:
            raise CheckpointError(
                f"config.json: the rope scaling's {name} has {len(values)} numbers; "
                f"half of the head size, {pairs}, are needed."
            )
        factors[name] = np.array(values, np.float32)
    scale = context / original
    attention_factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
    if rope.get("attention_factor") is not None:
        attention_factor = _number(rope, "attention_factor")
    return LongRope(factors["short_factor"], factors["long_factor"], attention_factor)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _integer(
    config: dict[str, Any], name: str, default: int | None = None, *, minimum: int = 1, maximum: int = (1 << 31) - 1
) -> int:
    value = config.get(name, default)
    if type(value) is not int or not minimum <= value <= maximum:
        allowed = f"a whole number from {minimum:,} to {maximum:,}"
        raise CheckpointError(f"config.json: {name} is {_shown(value)}; {allowed} is needed.")
    return value


def _number(config: dict[str, Any], name: str, default: float | None = None) -> float:
    value: Any = config.get(name, default)
    if not _is_number(value) or value <= 0:
        raise CheckpointError(f"config.json: {name} is {_shown(value)}; a positive number is needed.")
    return float(value)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:80]}..."
