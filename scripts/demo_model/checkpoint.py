"""The weights and configuration as files of a Hugging Face checkpoint, and a question put to them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaTokenizerFast, Phi3ForCausalLM

from .folder import write_json
from .tokenizer import ASSISTANT, END, ENDOFTEXT, prompt_for

STOPS = [ENDOFTEXT, ASSISTANT, END]
"""Generation ends at any of these, as Phi-3-mini's does."""

_CONFIG_KEYS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "embd_pdrop",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "pad_token_id",
    "resid_pdrop",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


def write_model(folder: Path, model: Phi3ForCausalLM) -> None:
    """Write `model.safetensors` in bfloat16, `config.json` and `generation_config.json`."""
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    versions = {"transformers_version": transformers.__version__}
    config = {key: getattr(model.config, key) for key in _CONFIG_KEYS}
    about = {"architectures": ["Phi3ForCausalLM"], "torch_dtype": "bfloat16"}
    write_json(folder / "config.json", config | about | versions)
    ends = {"bos_token_id": 1, "eos_token_id": STOPS, "pad_token_id": ENDOFTEXT}
    write_json(folder / "generation_config.json", ends | versions)


@torch.no_grad()
def greedy_answer(model: Phi3ForCausalLM, tokenizer: LlamaTokenizerFast, question: str) -> str:
    """Ask one question in the chat format and give the greedy answer, through `transformers.generate`."""
    inputs = tokenizer(prompt_for(question), return_tensors="pt")
    output = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        max_new_tokens=160,
        eos_token_id=STOPS,
        pad_token_id=ENDOFTEXT,
    )
    return str(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)).strip()
