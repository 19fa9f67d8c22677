"""Whether a checkpoint is a Phi-3: under its own name, under that of a wrapper, or as a copy that says it is a Llama.

A Phi-3 whose fused projections are split is, tensor for tensor, a Llama or a Mistral, and libraries that train those
save it so. Such a copy is told by Phi-3's vocabulary; a real Llama or Mistral is refused.
"""

import re
from collections.abc import Collection
from typing import Any

from edge_phi3.conversion.errors import UnsupportedModelError
from edge_phi3.conversion.safetensors import StoredTensor

ARCHITECTURE = "Phi3ForCausalLM"

_OF_TYPE = {"phi3": ARCHITECTURE, "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_DISGUISES = frozenset({"LlamaForCausalLM", "MistralForCausalLM"})
# What wrappers leave in the place of the model's own, and a Phi-3 without its output matrix, which may be tied.
_SAYS_NOTHING = re.compile(r"(PeftModel|AutoModelForCausalLM).*|OptimizedModule|Phi3Model")

_CHAT_TOKENS = ({"<|user|>", "<|assistant|>", "<|end|>"}, {"<|im_sep|>", "<|im_end|>"})
"""Tokens that only Phi-3, or Phi-4, has all of."""
_VOCABULARIES = (32064, 100352, 200064)
_WINDOW = 2047

_RELATIVES = {
    "Phi3SmallForCausalLM": "Phi-3-small has block-sparse attention and a tiktoken vocabulary",
    "Phi3VForCausalLM": "Phi-3-vision has an image encoder",
    "Phi4MMForCausalLM": "Phi-4-multimodal has image and speech encoders",
    "PhiMoEForCausalLM": "Phi-3.5-MoE is a mixture of experts",
    "PhimoeForCausalLM": "Phi-3.5-MoE is a mixture of experts",
    "PhiForCausalLM": "Phi-1 and Phi-2 have other layers",
    "Phi3ForSequenceClassification": "it sorts texts into classes and writes none",
    "Phi3ForTokenClassification": "it sorts tokens into classes and writes none",
}

_QUANTISED_TYPES = ("I8", "U8", "I32", "U32", "F8", "F4", "I4", "U4")
_QUANTISED_PARTS = frozenset({
    "SCB", "weight_format", "absmax", "quant_map", "nested_absmax", "quant_state", "qweight", "qzeros", "scales",
    "g_idx", "weight_scale", "input_scale", "weight_scale_inv", "weight_packed", "weight_zero_point", "codes",
    "codebooks",
})  # fmt: skip


def has_phi_tokens(tokens: Collection[str]) -> bool:
    """Return whether a vocabulary with these added tokens is one of the Phi family."""
    return any(wanted <= set(tokens) for wanted in _CHAT_TOKENS)


def refuse_other_models(config: dict[str, Any], *, disguised: bool | None = None) -> None:
    """Refuse what ``config.json`` says is no Phi-3.

    `disguised` tells whether what calls itself a Llama or a Mistral is a Phi-3; None, where only the configuration is
    known, goes by its vocabulary's size and its window.
    """
    architectures = _architectures(config)
    if disguised is None:
        disguised = config.get("vocab_size") in _VOCABULARIES or config.get("sliding_window") == _WINDOW
    if architectures != [ARCHITECTURE] and not (disguised and set(architectures) <= _DISGUISES):
        named = f"the architecture {', '.join(architectures)}" if architectures else "no architecture"
        reason = next((f" ({_RELATIVES[name]})" for name in architectures if name in _RELATIVES), "")
        but = ", or a copy of it with split projections and its own vocabulary" * (set(architectures) <= _DISGUISES)
        raise UnsupportedModelError(f"config.json names {named}{reason}; only {ARCHITECTURE} can be converted{but}.")
    if (act := config.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"config.json: hidden_act is {act!r}; Phi-3 has silu.")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UnsupportedModelError(f"config.json: {name} is set; llama.cpp's Phi-3 has no biases.")


def check_quantization(config: dict[str, Any], tensors: dict[str, StoredTensor]) -> tuple[str, ...]:
    """Refuse quantised weights; return a sentence when only ``config.json`` still speaks of them."""
    stated = config.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    for name, stored in tensors.items():
        of_integers = stated and stored.dtype.startswith(_QUANTISED_TYPES)
        if of_integers or not _QUANTISED_PARTS.isdisjoint(name.split(".")):
            raise UnsupportedModelError(
                f"The checkpoint is quantised already{f' ({method})' if method else ''}: {stored.name} has the dtype "
                f"{stored.dtype}. Convert the model that it was made from, or load it with transformers, call its "
                "dequantize(), and save_pretrained() again."
            )
    if not stated:
        return ()
    how = f" ({method})" if method else ""
    return (f"config.json has a quantization_config{how}, but no weight is quantised; it has no effect.",)


def _architectures(config: dict[str, Any]) -> list[str]:
    """Return the names of the model's class: the stated ones, or what ``model_type`` stands for."""
    stated = config.get("architectures")
    listed = stated if isinstance(stated, list) else [stated] if stated else []
    # Sharded by torch, a class is called FSDP and its name.
    named = [str(name).removeprefix("FSDP") for name in listed if name and not _SAYS_NOTHING.fullmatch(str(name))]
    kind = config.get("model_type")
    return named or ([_OF_TYPE.get(str(kind), str(kind))] if kind else [])
