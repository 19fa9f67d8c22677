"""Phi-3's hyper-parameters and tensors: what ``config.json`` says, checked, and what a GGUF calls it.

The reference is ``Phi3Config`` and ``Phi3ForCausalLM`` of transformers; the GGUF side is what llama.cpp's
converter writes and its ``phi3`` architecture reads.
"""

import dataclasses
from typing import Annotated, Any

import gguf
import msgspec

from edge_phi3.conversion.architecture import ARCHITECTURE as ARCHITECTURE  # noqa: PLC0414 - read from here as well
from edge_phi3.conversion.architecture import refuse_other_models
from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.json_files import LARGEST, PositiveNumber, Size, typed
from edge_phi3.conversion.rope import Rope, read_rope

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The matrices that may be one, by the checkpoint's names."""

IN_GGUF = {
    "input_layernorm": "attn_norm", "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""What the tensors of a block are called in the GGUF."""

PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The matrices that fused ones are made of, in their order."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the checkpoint is called in the GGUF, and the shape that it must have.

    Stored in parts, it is their rows, one part after the other: `parts` are their names and numbers of rows.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, int] = dataclasses.field(default_factory=dict)


class _Config(msgspec.Struct, frozen=True, kw_only=True):
    """The entries of ``config.json``, with what Phi3Config assumes for an absent one."""

    vocab_size: Size = 32064
    hidden_size: Size = 3072
    intermediate_size: Size = 8192
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=512)] = 32  # LLAMA_MAX_LAYERS of llama.cpp
    num_attention_heads: Size = 32
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size = 4096
    rms_norm_eps: PositiveNumber = 1e-5
    sliding_window: Annotated[int, msgspec.Meta(ge=0, le=LARGEST)] = 0
    tie_word_embeddings: bool = False


class Phi3(_Config, frozen=True, kw_only=True):
    """Checked hyper-parameters, under the names of ``config.json``; a `sliding_window` of 0 is none.

    `rope` holds what it says on rotary positions; `notes` are sentences for whoever converts the checkpoint, as are
    those of `rope`.
    """

    rope: Rope
    notes: tuple[str, ...] = ()

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    def tensors(self) -> dict[str, TensorSpec]:
        """Return the tensors that a checkpoint of this model has, by name."""
        width, vocabulary = self.hidden_size, self.vocab_size
        queries, keys = self.num_attention_heads * self.head_size, self.kv_heads * self.head_size
        specs = {
            EMBEDDING: TensorSpec("token_embd.weight", (vocabulary, width)),
            "model.norm.weight": TensorSpec("output_norm.weight", (width,)),
        }
        if not self.tie_word_embeddings:
            specs[HEAD] = TensorSpec("output.weight", (vocabulary, width))
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (width,),
            "self_attn.qkv_proj": (queries + 2 * keys, width),
            "self_attn.o_proj": (width, width),
            "post_attention_layernorm": (width,),
            "mlp.gate_up_proj": (2 * self.intermediate_size, width),
            "mlp.down_proj": (width, self.intermediate_size),
        }
        rows = {"self_attn.qkv_proj": (queries, keys, keys), "mlp.gate_up_proj": (self.intermediate_size,) * 2}
        for i in range(self.num_hidden_layers):
            for theirs, shape in shapes.items():
                parts = zip(PARTS.get(theirs, ()), rows.get(theirs, ()), strict=True)
                specs[f"model.layers.{i}.{theirs}.weight"] = TensorSpec(
                    f"blk.{i}.{IN_GGUF[theirs]}.weight",
                    shape,
                    {f"model.layers.{i}.{part}.weight": count for part, count in parts},
                )
        return specs

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``phi3.*`` keys.

        ``phi3.attention.sliding_window`` holds the window of ``config.json``, 0 when there is none.
        llama.cpp reads the key and does not use it; the engine does.
        """
        writer.add_context_length(self.max_position_embeddings)
        writer.add_rope_scaling_orig_ctx_len(self.rope.original_context)
        writer.add_embedding_length(self.hidden_size)
        writer.add_feed_forward_length(self.intermediate_size)
        writer.add_block_count(self.num_hidden_layers)
        writer.add_head_count(self.num_attention_heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(self.rms_norm_eps)
        writer.add_rope_dimension_count(self.rope.dimensions)
        writer.add_rope_freq_base(self.rope.theta)
        writer.add_sliding_window(self.sliding_window)
        if self.rope.longrope is not None:
            writer.add_rope_scaling_attn_factors(self.rope.longrope.attention_factor)


def read_phi3(config: dict[str, Any], *, disguised: bool | None = None) -> Phi3:
    """Check ``config.json`` and return its hyper-parameters; `disguised` is as `refuse_other_models` takes it."""
    refuse_other_models(config, disguised=disguised)
    stated = {name: value for name, value in config.items() if value is not None}
    checked = typed(stated, _Config, "config.json")
    width, heads = checked.hidden_size, checked.num_attention_heads
    if width % heads or width // heads % 2:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share a hidden_size of {width}.")
    if checked.head_dim not in {None, width // heads}:
        raise UnsupportedModelError(
            f"config.json: head_dim is {checked.head_dim}; hidden_size {width} has {heads} heads of {width // heads}."
        )
    rope = read_rope(stated, width // heads, checked.max_position_embeddings)
    model = Phi3(**msgspec.structs.asdict(checked), rope=rope)
    if heads % model.kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {model.kv_heads} key-value heads.")
    return model
