"""The names that ``generate_kwargs`` may hold: types, defaults, what null means, or why one is refused.

The names, types and defaults are those of ``transformers.GenerationConfig`` 4.49.0, with `seed` added. What
each does is told in ``docs/parameters.md``; rules between parameters are in `edge_phi3.generation.config`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from edge_phi3.errors import EdgePhi3Error


class ParameterError(EdgePhi3Error):
    """A parameter is unknown, unsupported, of the wrong type, out of range, or at odds with another.

    Attributes:
        parameter: the name as the request gave it.
    """

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Null(enum.Enum):
    """What an explicit null stands for where it is no value of its own."""

    INHERIT = "the model's generation_config.json, or else the default of transformers"


Reader = Callable[[str, object], object]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One supported name.

    Attributes:
        default: the value when neither request, API, nor ``generation_config.json`` gives one.
        read: checks the JSON type of a value and converts it; raises `ParameterError`.
        null: the value that an explicit null stands for.
    """

    default: object
    read: Reader
    null: object = Null.INHERIT


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
        """Tell whether `value` asks for nothing."""
        return value is None or any(type(value) is type(known) and value == known for known in self.harmless)


def _wrong(name: str, value: object, allowed: str) -> ParameterError:
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return ParameterError(name, f"`{name}` must be {allowed}, but is {shown}.")


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _integer(minimum: int | None = None, maximum: int | None = None) -> Callable[[str, object], int]:
    allowed = "an integer"
    if minimum is not None and maximum is not None:
        allowed += f" from {minimum} to {maximum}"
    elif minimum is not None:
        allowed += f" of at least {minimum}"

    def read(name: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong(name, value, allowed)
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            raise _wrong(name, value, allowed)
        return value

    return read


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(name, value, "a finite number")
    return number


def _seconds(name: str, value: object) -> float:
    number = _number(name, value)
    if number < 0:
        raise _wrong(name, value, "a number of seconds of at least 0")
    return number


def _early_stopping(name: str, value: object) -> bool | str:
    if isinstance(value, bool) or value == "never":
        return value
    raise _wrong(name, value, 'true, false or "never"')


def _stop_strings(name: str, value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise _wrong(name, value, "a non-empty string or a non-empty list of them")
    return tuple(texts)


def _integers(name: str, value: object, allowed: str, minimum: int | None = None) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(name, value, allowed)
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or (minimum is not None and item < minimum):
            raise _wrong(name, value, allowed)
    return tuple(value)


def _token_list(name: str, value: object) -> tuple[int, ...]:
    return _integers(name, value, "a list of token ids")


def _one_or_many_tokens(minimum: int) -> Reader:
    allowed = "a token id or a list of token ids" + (" (-1: none)" if minimum < 0 else "")

    def read(name: str, value: object) -> tuple[int, ...]:
        return _integers(name, value if isinstance(value, list | tuple) else [value], allowed, minimum)

    return read


def _phrases(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    allowed = "a non-empty list of non-empty lists of token ids"
    if not isinstance(value, list | tuple) or not value:
        raise _wrong(name, value, allowed)
    phrases = tuple(_integers(name, phrase, allowed, 0) for phrase in value)
    if not all(phrases):
        raise _wrong(name, value, allowed)
    return phrases


def _sequence_bias(name: str, value: object) -> tuple[tuple[tuple[int, ...], float], ...]:
    allowed = "a non-empty list of pairs [[positive token ids], number]"
    if not isinstance(value, list | tuple) or not value:
        raise _wrong(name, value, allowed)
    biases: dict[tuple[int, ...], float] = {}
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _wrong(name, value, allowed)
        tokens = _integers(name, pair[0], allowed, 1)
        if not tokens:
            raise _wrong(name, value, allowed)
        biases[tokens] = _number(name, pair[1])
    return tuple(biases.items())


def _start_and_factor(name: str, value: object) -> tuple[int, float]:
    allowed = "a pair [start, factor] of an integer and a number"
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(name, value, allowed)
    start = value[0]
    if not isinstance(start, int) or isinstance(start, bool):
        raise _wrong(name, value, allowed)
    return start, _number(name, value[1])


PARAMETERS: Final[Mapping[str, Parameter]] = {
    # Length
    "max_length": Parameter(None, _integer(1)),
    "max_new_tokens": Parameter(None, _integer(1), null=None),
    "min_length": Parameter(0, _integer(0), null=0),
    "min_new_tokens": Parameter(None, _integer(0), null=None),
    "early_stopping": Parameter(False, _early_stopping),
    "max_time": Parameter(None, _seconds, null=None),
    "stop_strings": Parameter((), _stop_strings, null=()),
    # Strategy
    "do_sample": Parameter(False, _boolean, null=False),
    "num_beams": Parameter(1, _integer(1), null=1),
    "num_beam_groups": Parameter(1, _integer(1)),
    "num_return_sequences": Parameter(1, _integer(1)),
    "diversity_penalty": Parameter(0.0, _number, null=None),
    "length_penalty": Parameter(1.0, _number),
    # Logits
    "temperature": Parameter(1.0, _number, null=1.0),
    "top_k": Parameter(50, _integer(), null=0),
    "top_p": Parameter(1.0, _number, null=1.0),
    "min_p": Parameter(None, _number, null=None),
    "typical_p": Parameter(1.0, _number, null=1.0),
    "epsilon_cutoff": Parameter(0.0, _number, null=0.0),
    "eta_cutoff": Parameter(0.0, _number, null=0.0),
    "repetition_penalty": Parameter(1.0, _number, null=1.0),
    "encoder_repetition_penalty": Parameter(1.0, _number, null=1.0),
    "no_repeat_ngram_size": Parameter(0, _integer(0), null=0),
    "encoder_no_repeat_ngram_size": Parameter(0, _integer(0), null=0),
    "bad_words_ids": Parameter((), _phrases, null=()),
    "sequence_bias": Parameter((), _sequence_bias, null=()),
    "renormalize_logits": Parameter(False, _boolean, null=False),
    "forced_bos_token_id": Parameter(None, _integer(0), null=None),
    "forced_eos_token_id": Parameter((), _one_or_many_tokens(0), null=()),
    "remove_invalid_values": Parameter(False, _boolean, null=False),
    "exponential_decay_length_penalty": Parameter(None, _start_and_factor, null=None),
    "suppress_tokens": Parameter((), _token_list, null=()),
    "begin_suppress_tokens": Parameter((), _token_list, null=()),
    # Output
    "output_scores": Parameter(False, _boolean, null=False),
    "return_dict_in_generate": Parameter(False, _boolean, null=False),
    # Special tokens: their defaults are the model's
    "bos_token_id": Parameter(None, _integer(0)),
    "eos_token_id": Parameter(None, _one_or_many_tokens(-1)),
    "pad_token_id": Parameter(None, _integer(0)),
    # Ours
    "seed": Parameter(None, _integer(0, 2**64 - 1), null=None),
}
"""Every supported name."""

_ASSISTED = "assisted generation needs a second model or a draft; every token here comes from the one model"
_ENCODER = "Phi-3 has no encoder; the decoder starts from the prompt"
_HIDDEN = "it needs the hidden states of the model, which llama.cpp does not give"
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
    "max_matching_ngram_size": Refused(_ASSISTED, changes_tokens=False),
    "negative_prompt_attention_mask": Refused("it belongs to `guidance_scale`, which is not supported"),
    "negative_prompt_ids": Refused("it belongs to `guidance_scale`, which is not supported"),
    "num_assistant_tokens": Refused(_ASSISTED, (20,), changes_tokens=False),
    "num_assistant_tokens_schedule": Refused(_ASSISTED, ("constant",), changes_tokens=False),
    "output_attentions": Refused("llama.cpp does not give attention weights", (False,), changes_tokens=False),
    "output_hidden_states": Refused(_HIDDEN, (False,), changes_tokens=False),
    "output_logits": Refused("a reply holds processed scores only (`output_scores`)", (False,), changes_tokens=False),
    "penalty_alpha": Refused("contrastive search compares hidden states, which llama.cpp does not give", (0, 0.0)),
    "prefix_allowed_tokens_fn": Refused(_OBJECT),
    "prompt_lookup_num_tokens": Refused(_ASSISTED),
    "return_legacy_cache": Refused("a reply does not hold the KV cache", (False,), changes_tokens=False),
    "stopping_criteria": Refused(_OBJECT),
    "streamer": Refused('ask for `"stream": true` beside the prompt instead'),
    "synced_gpus": Refused("a model runs in one process", (False,), changes_tokens=False),
    "target_lookbehind": Refused(_ASSISTED, (10,), changes_tokens=False),
    "token_healing": Refused("the prompt's tokens are taken as they are", (False,)),
    "tokenizer": Refused(_OBJECT),
    "use_cache": Refused("the KV cache is always used; it does not change the tokens", (True,), changes_tokens=False),
    "watermarking_config": Refused("its choice of tokens hangs on torch's random numbers"),
}
"""Every name of transformers that is refused unless its value asks for nothing."""
