"""Phi-3's hyper-parameters and tensors: what ``config.json`` says, checked, and what a GGUF calls it.

The reference is ``Phi3Config`` and ``Phi3ForCausalLM`` of transformers; the GGUF side is what llama.cpp's
converter writes and its ``phi3`` architecture reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gguf

from edge_phi3.conversion.checkpoint import integer, number
from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.rope import LongRope, read_rope

ARCHITECTURE = "Phi3ForCausalLM"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The matrices that may be one, by the checkpoint's names."""

_RELATIVES = {
    "Phi3SmallForCausalLM": "Phi-3-small has block-sparse attention and a tiktoken vocabulary",
    "Phi3VForCausalLM": "Phi-3-vision has an image encoder",
    "Phi4MMForCausalLM": "Phi-4-multimodal has image and speech encoders",
    "PhiMoEForCausalLM": "Phi-3.5-MoE is a mixture of experts",
    "PhimoeForCausalLM": "Phi-3.5-MoE is a mixture of experts",
    "PhiForCausalLM": "Phi-1 and Phi-2 have other layers",
}

_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp

# What Phi3Config assumes for an absent entry.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the checkpoint is called in the GGUF, and the shape that it must have."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Phi3:
    """Checked hyper-parameters, under the names of ``config.json``.

    `notes` are sentences on what contradicts itself in the checkpoint, for whoever converts it.
    """

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
    notes: tuple[str, ...] = ()

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def tensors(self) -> dict[str, TensorSpec]:
        """Return the tensors that a checkpoint of this model has, by name."""
        width, vocabulary = self.hidden_size, self.vocab_size
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_size
        specs = {
            EMBEDDING: TensorSpec("token_embd.weight", (vocabulary, width)),
            "model.norm.weight": TensorSpec("output_norm.weight", (width,)),
        }
        if not self.tie_word_embeddings:
            specs[HEAD] = TensorSpec("output.weight", (vocabulary, width))
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
    stated = {name: value for name, value in config.items() if value is not None}
    config = _DEFAULTS | stated
    width, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    if width % heads or width // heads % 2:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share a hidden_size of {width}.")
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads.")
    if integer(config, "head_dim", width // heads) != width // heads:
        raise UnsupportedModelError(
            f"config.json: head_dim is {config['head_dim']}; hidden_size {width} has {heads} heads of {width // heads}."
        )
    context = integer(config, "max_position_embeddings")
    rope = read_rope(stated, width // heads // 2, context)
    return Phi3(
        vocab_size=integer(config, "vocab_size"),
        hidden_size=width,
        intermediate_size=integer(config, "intermediate_size"),
        num_hidden_layers=integer(config, "num_hidden_layers", maximum=_MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        original_max_position_embeddings=rope.original_context,
        rms_norm_eps=number(config, "rms_norm_eps"),
        rope_theta=rope.theta,
        longrope=rope.longrope,
        sliding_window=integer(config, "sliding_window", 0, minimum=0) or None,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        notes=rope.notes,
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
