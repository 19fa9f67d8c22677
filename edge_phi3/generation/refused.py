"""The names of ``transformers.GenerationConfig`` 4.49.0 and ``generate()`` that cannot be had here, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Refused:
    """One name of transformers that cannot be had here.

    Attributes:
        reason: completes the sentence "`name` is not supported: ...".
        harmless: values (beside null) that change nothing, and are accepted.
        changes_tokens: whether another value would change which tokens are chosen. Where it would not, a
            model's ``generation_config.json`` may hold it without harm.
    """

    reason: str
    harmless: tuple[object, ...] = ()
    changes_tokens: bool = True

    def accepts(self, value: object) -> bool:
        """Return whether `value` changes nothing."""
        return value is None or any(type(value) is type(known) and value == known for known in self.harmless)


_ASSISTED = "assisted generation needs a second model; see `prompt_lookup_num_tokens` for drafts without one"
_ENCODER = "Phi-3 has no encoder; the decoder starts from the prompt"
_HIDDEN = "it needs the hidden states of the model, which llama.cpp does not return"
_CACHE = "the engine has one KV cache, shared by all requests and set by the service's own options"
_OBJECT = "it takes a Python object, which JSON cannot hold"

REFUSED: Final[Mapping[str, Refused]] = {
    "assistant_confidence_threshold": Refused(_ASSISTED, (0.4,), changes_tokens=False),
    "assistant_early_exit": Refused(_ASSISTED),
    "assistant_lookbehind": Refused(_ASSISTED, (10,), changes_tokens=False),
    "assistant_model": Refused(_ASSISTED),
    "assistant_tokenizer": Refused(_ASSISTED),
    "cache_config": Refused(_CACHE, changes_tokens=False),
    "cache_implementation": Refused(_CACHE, changes_tokens=False),
    "compile_config": Refused("nothing is compiled while requests run", changes_tokens=False),
    "constraints": Refused(_OBJECT),
    "decoder_start_token_id": Refused(_ENCODER, changes_tokens=False),
    "disable_compile": Refused("nothing is compiled while requests run", (False,), changes_tokens=False),
    "dola_layers": Refused(_HIDDEN),
    "force_words_ids": Refused("constrained beam search is not implemented; `sequence_bias` favours phrases"),
    "forced_decoder_ids": Refused("transformers 4.49.0 refuses it too; put the tokens into the prompt"),
    "generation_config": Refused("give its fields one by one"),
    "generation_kwargs": Refused("give its fields one by one", ({},)),
    "guidance_scale": Refused("it needs a second, unconditional pass of the model per token", (1, 1.0)),
    "is_assistant": Refused(_ASSISTED, (False,)),
    "logits_processor": Refused(_OBJECT),
    "low_memory": Refused("beams share their KV cache already", (False,), changes_tokens=False),
    "max_matching_ngram_size": Refused("the longest match counts (`prompt_lookup_num_tokens`)", changes_tokens=False),
    "negative_prompt_attention_mask": Refused("it belongs to `guidance_scale`, which is not supported"),
    "negative_prompt_ids": Refused("it belongs to `guidance_scale`, which is not supported"),
    "num_assistant_tokens": Refused(_ASSISTED, (20,), changes_tokens=False),
    "num_assistant_tokens_schedule": Refused(_ASSISTED, ("constant",), changes_tokens=False),
    "output_attentions": Refused("llama.cpp does not return attention weights", (False,), changes_tokens=False),
    "output_hidden_states": Refused(_HIDDEN, (False,), changes_tokens=False),
    "output_logits": Refused("a reply holds processed scores only (`output_scores`)", (False,), changes_tokens=False),
    "penalty_alpha": Refused("contrastive search compares hidden states, which llama.cpp does not return", (0, 0.0)),
    "prefix_allowed_tokens_fn": Refused(_OBJECT),
    "return_legacy_cache": Refused("a reply does not hold the KV cache", (False,), changes_tokens=False),
    "stopping_criteria": Refused(_OBJECT),
    "streamer": Refused('set `"stream": true` beside the prompt instead'),
    "synced_gpus": Refused("a model runs in one process", (False,), changes_tokens=False),
    "target_lookbehind": Refused(_ASSISTED, (10,), changes_tokens=False),
    "token_healing": Refused("the prompt's tokens are taken as they are", (False,)),
    "tokenizer": Refused(_OBJECT),
    "use_cache": Refused("the KV cache is always used; it does not change the tokens", (True,), changes_tokens=False),
    "watermarking_config": Refused("its choice of tokens depends on torch's random numbers"),
}
"""Every name of transformers that is refused unless its value changes nothing."""
