"""Phi-3's hyper-parameters and tensors: what ``config.json`` says, checked, and what a GGUF calls it.

The reference is ``Phi3Config`` and ``Phi3ForCausalLM`` of transformers; the GGUF side is what llama.cpp's
converter writes and its ``phi3`` architecture reads. Of rotary positions, transformers 4 reads ``rope_scaling``, with
``rope_theta`` beside it; transformers 5 writes ``rope_parameters`` with all of it inside, and takes ``rope_scaling``
where a file has both. Files that went through several hands have both.

A Phi-3 whose fused projections are split is, tensor for tensor, a Llama or a Mistral, and libraries that train those
save it so. Such a copy is told by Phi-3's vocabulary; a real Llama or Mistral is refused.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.json_files import LARGEST, PositiveNumber, Size, typed

ARCHITECTURE = "Phi3ForCausalLM"

_OF_TYPE = {"phi3": ARCHITECTURE, "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_DISGUISES = frozenset({"LlamaForCausalLM", "MistralForCausalLM"})
# What wrappers leave in the place of the model's own, and a Phi-3 without its output matrix, which may be tied.
_SAYS_NOTHING = re.compile(r"(PeftModel|AutoModelForCausalLM).*|OptimizedModule|Phi3Model")

REFUSED: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("refused.json").read_text("utf-8"))
"""Architectures, and options of adapters, that cannot be converted, and why."""

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


_FIELDS = ("rope_scaling", "rope_parameters")
_LONGROPE_SPELLINGS = ("longrope", "su", "yarn")
_FACTORS = ("short_factor", "long_factor")

# Entries that may stand beside the two as well, and what Phi3Config assumes when they stand nowhere.
_BESIDE = {"rope_theta": 10000.0, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}


class _Beside(msgspec.Struct, omit_defaults=True):
    rope_theta: PositiveNumber | None = None
    original_max_position_embeddings: Annotated[int, msgspec.Meta(ge=2, le=LARGEST)] | None = None
    partial_rotary_factor: PositiveNumber | None = None


class _Inside(_Beside, omit_defaults=True):
    rope_type: Any = None
    type: Any = None
    short_factor: list[PositiveNumber] | None = None
    long_factor: list[PositiveNumber] | None = None
    attention_factor: PositiveNumber | None = None


class _Places(_Beside, omit_defaults=True):
    rope_scaling: _Inside | None = None
    rope_parameters: _Inside | None = None


class LongRope(NamedTuple):
    """The rope scaling of the long-context models.

    The factors divide the rotary frequencies up to the original context length, and beyond it: float32, shape
    (rotated elements of a head / 2,). Cosines and sines are multiplied by `attention_factor`.
    """

    short_factor: NDArray[np.float32]
    long_factor: NDArray[np.float32]
    attention_factor: float


class Rope(NamedTuple):
    """Rotary positions: `dimensions`, the first of a head, are rotated; the short factors hold to `original_context`.

    `notes` are sentences on entries that contradict each other, for whoever converts.
    """

    theta: float
    dimensions: int
    original_context: int
    longrope: LongRope | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a tensor of the checkpoint is called in the GGUF, and the shape that it must have.

    Stored in parts, it is their rows, one part after the other: `parts` are their names and numbers of rows.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, int] = dataclasses.field(default_factory=dict)


class _Config(msgspec.Struct, frozen=True, kw_only=True):  # with what Phi3Config assumes for an absent entry
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
        """Add the ``phi3.*`` keys; llama.cpp reads that of the window (0: none) without using it, the engine does."""
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
    """Check ``config.json`` and return its hyper-parameters; `disguised` is as `_refuse_other_models` takes it."""
    _refuse_other_models(config, disguised=disguised)
    stated = {name: value for name, value in config.items() if value is not None}
    checked = typed(stated, _Config, "config.json")
    width, heads = checked.hidden_size, checked.num_attention_heads
    if width % heads or width // heads % 2:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share a hidden_size of {width}.")
    if checked.head_dim not in {None, width // heads}:
        raise UnsupportedModelError(
            f"config.json: head_dim is {checked.head_dim}; hidden_size {width} has {heads} heads of {width // heads}."
        )
    rope = _read_rope(stated, width // heads, checked.max_position_embeddings)
    model = Phi3(**msgspec.structs.asdict(checked), rope=rope)
    if heads % model.kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads cannot share {model.kv_heads} key-value heads.")
    return model


def _refuse_other_models(config: dict[str, Any], *, disguised: bool | None = None) -> None:
    """Refuse what ``config.json`` says is no Phi-3.

    `disguised` tells whether what calls itself a Llama or a Mistral is a Phi-3; None, where only the configuration is
    known, goes by its vocabulary's size and its window.
    """
    architectures = _architectures(config)
    if disguised is None:
        disguised = config.get("vocab_size") in (32064, 100352, 200064) or config.get("sliding_window") == 2047
    if architectures != [ARCHITECTURE] and not (disguised and set(architectures) <= _DISGUISES):
        named = f"the architecture {', '.join(architectures)}" if architectures else "no architecture"
        reason = next((f" ({why})" for name, why in REFUSED["architectures"].items() if name in architectures), "")
        but = ", or a copy of it with split projections and its own vocabulary" * (set(architectures) <= _DISGUISES)
        raise UnsupportedModelError(f"config.json names {named}{reason}; only {ARCHITECTURE} can be converted{but}.")
    if (act := config.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"config.json: hidden_act is {act!r}; Phi-3 has silu.")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UnsupportedModelError(f"config.json: {name} is set; llama.cpp's Phi-3 has no biases.")


def _architectures(config: dict[str, Any]) -> list[str]:
    """Return the names of the model's class: the stated ones, or what ``model_type`` stands for."""
    stated = config.get("architectures")
    listed = stated if isinstance(stated, list) else [stated] if stated else []
    # Sharded by torch, a class is called FSDP and its name.
    named = [str(name).removeprefix("FSDP") for name in listed if name and not _SAYS_NOTHING.fullmatch(str(name))]
    kind = config.get("model_type")
    return named or ([_OF_TYPE.get(str(kind), str(kind))] if kind else [])


def _read_rope(config: dict[str, Any], head_size: int, context: int) -> Rope:
    said: dict[str, Any] = msgspec.to_builtins(typed(config, _Places, "config.json"))
    stated = {name: entries for name in _FIELDS if (entries := said.pop(name, None))}
    kinds = {name: _kind(name, entries) for name, entries in stated.items()}
    if len(stated) == 2:
        _refuse_contradictions(said, *stated.values())
    # What stands in two places is the same there, but for the type.
    rope = _BESIDE | said
    for entries in stated.values():
        rope |= entries
    dimensions = int(head_size * rope["partial_rotary_factor"])
    if dimensions % 2 or not 2 <= dimensions <= head_size:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {rope['partial_rotary_factor']} rotates {dimensions} of a head's "
            f"{head_size} elements; an even number, from 2 to all of them, can be rotated."
        )
    return Rope(
        theta=float(rope["rope_theta"]),
        dimensions=dimensions,
        original_context=rope["original_max_position_embeddings"],
        longrope=_longrope(rope, dimensions // 2, context) if "longrope" in kinds.values() else None,
        notes=_notes(stated, kinds),
    )


def _kind(name: str, entries: dict[str, Any]) -> str:
    stated = [entries[entry] for entry in ("rope_type", "type") if entry in entries]
    for kind in stated:
        if kind != "default" and kind not in _LONGROPE_SPELLINGS:
            raise UnsupportedModelError(
                f"config.json: {name}: the rope scaling type is {kind!r}; "
                "Phi-3 has 'longrope' ('su' in older revisions) or none."
            )
    kinds = {"default" if kind == "default" else "longrope" for kind in stated} or {"default"}
    if len(kinds) > 1:
        raise CheckpointError(
            f"config.json: {name} has the rope_type {stated[0]!r} and the type {stated[1]!r}; "
            "give the one that the model was trained with."
        )
    return kinds.pop()


def _refuse_contradictions(config: dict[str, Any], scaling: dict[str, Any], parameters: dict[str, Any]) -> None:
    for entry in (*_BESIDE, *_FACTORS, "attention_factor"):
        # An object that does not have it leaves it to what stands beside, if anything does.
        beside = config.get(entry, scaling.get(entry, parameters.get(entry)))
        if scaling.get(entry, beside) != parameters.get(entry, beside):
            raise CheckpointError(
                f"config.json: rope_scaling and rope_parameters contradict each other on {entry}; "
                "remove the one that the model was not trained with."
            )


def _notes(stated: dict[str, dict[str, Any]], kinds: dict[str, str]) -> tuple[str, ...]:
    if len(set(kinds.values())) == 2:
        kept, other = sorted(kinds, key=lambda name: kinds[name] != "longrope")
        return (
            f"config.json: {kept} has the factors of longrope and {other} the type 'default'; the factors are kept.",
        )
    if "longrope" in kinds.values():
        return ()
    return tuple(
        f"config.json: {name} has a {entry}, but its type is not 'longrope'; as in transformers, it has no effect."
        for name, entries in stated.items()
        for entry in _FACTORS
        if entry in entries
    )


def _longrope(rope: dict[str, Any], pairs: int, context: int) -> LongRope:
    short, long = (np.array(rope.get(name, []), np.float32) for name in _FACTORS)
    for name, factors in zip(_FACTORS, (short, long), strict=True):
        if factors.size != pairs:
            raise CheckpointError(
                f"config.json: the rope scaling's {name} has {factors.size} numbers; "
                f"half of the rotated elements of a head, {pairs}, are needed."
            )
    original = rope["original_max_position_embeddings"]
    scale = context / original
    derived = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
    return LongRope(short, long, rope.get("attention_factor", derived))
