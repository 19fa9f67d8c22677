"""The generation parameters for the OpenAPI document: meaning, JSON type, range, default and an example of each.

Names, and which of them exist, are `edge_phi3.generation.parameters`' own; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edge_phi3.generation.config import API_DEFAULTS
from edge_phi3.generation.parameters import PARAMETERS, REFUSED

Schema = dict[str, Any]

_TOKEN: Final[Schema] = {"type": "integer", "minimum": 0}
_TOKENS: Final[Schema] = {"type": "array", "items": _TOKEN}
_BOOLEAN: Final[Schema] = {"type": "boolean"}
_NUMBER: Final[Schema] = {"type": "number"}


def _integer(minimum: int | None = None, maximum: int | None = None) -> Schema:
    limits = {"minimum": minimum, "maximum": maximum}
    return {"type": "integer", **{name: limit for name, limit in limits.items() if limit is not None}}


_DESCRIBED: Final[Mapping[str, tuple[Schema, str, object]]] = {
    "max_length": (_integer(1), "The most tokens of a sequence, prompt included. `max_new_tokens` wins over it.", 200),
    "max_new_tokens": (_integer(1), "The most tokens generated for a sequence, prompt not included.", 64),
    "min_length": (_integer(0), "The least tokens of a sequence, prompt included: it cannot end before.", 0),
    "min_new_tokens": (_integer(0), "The least tokens generated for a sequence. Wins over `min_length`.", 8),
    "early_stopping": (
        {"enum": [True, False, "never"]},
        "When beam search ends: true, as soon as there are `num_beams` finished candidates; false, when better ones "
        'are unlikely; "never", when better ones are impossible.',
        False,
    ),
    "max_time": ({"type": "number", "minimum": 0}, "Seconds after which no further token is chosen.", 30.0),
    "stop_strings": (
        {"oneOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}]},
        "Texts that end a sequence as soon as they appear in it.",
        ["\n\n"],
    ),
    "do_sample": (_BOOLEAN, "true: draw each token from the distribution; false: take the likeliest.", False),
    "num_beams": (_integer(1), "Beams of beam search; 1: no beam search.", 1),
    "num_beam_groups": (_integer(1), "Groups that the beams are divided into, to differ from each other.", 1),
    "num_return_sequences": (_integer(1), "How many sequences are returned.", 1),
    "diversity_penalty": (_NUMBER, "Taken from the score of a token that another group chose in the same step.", 0.0),
    "length_penalty": (
        _NUMBER,
        "Exponent of the length by which a beam's score is divided: above 0 favours long answers, below 0 short ones.",
        1.0,
    ),
    "temperature": (
        {"type": "number", "exclusiveMinimum": 0},
        "Divides the logits before sampling: below 1 makes likely tokens likelier, above 1 evens them out.",
        1.0,
    ),
    "top_k": (_integer(0), "Sample among the k likeliest tokens; 0: among all.", 10),
    "top_p": (
        {"type": "number", "minimum": 0, "maximum": 1},
        "Sample among the likeliest tokens whose probabilities add up to this (nucleus sampling).",
        1.0,
    ),
    "min_p": (
        {"type": "number", "minimum": 0, "maximum": 1},
        "Sample among the tokens at least this times as likely as the likeliest.",
        0.05,
    ),
    "typical_p": (
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "Sample among the tokens whose surprise is closest to the expected one, up to this probability.",
        1.0,
    ),
    "epsilon_cutoff": (
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "Sample among the tokens of at least this probability; 0: off.",
        0.0003,
    ),
    "eta_cutoff": (
        {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "Like `epsilon_cutoff`, lowered where the distribution is flat; 0: off.",
        0.0006,
    ),
    "repetition_penalty": (
        {"type": "number", "exclusiveMinimum": 0},
        "Makes tokens that occurred before, in prompt or answer, less likely when above 1; 1: off.",
        1.1,
    ),
    "encoder_repetition_penalty": (
        {"type": "number", "exclusiveMinimum": 0},
        "Makes the prompt's tokens likelier when above 1; 1: off.",
        1.0,
    ),
    "no_repeat_ngram_size": (_integer(0), "No run of this many tokens occurs twice; 0: off.", 3),
    "encoder_no_repeat_ngram_size": (
        _integer(0),
        "No run of this many tokens of the prompt occurs in the answer; 0: off.",
        0,
    ),
    "bad_words_ids": (
        {"type": "array", "items": {**_TOKENS, "minItems": 1}, "minItems": 1},
        "Runs of token ids that must not be generated.",
        [[1234], [56, 78]],
    ),
    "sequence_bias": (
        {"type": "array", "items": {"type": "array", "minItems": 2, "maxItems": 2}, "minItems": 1},
        "Pairs of a run of token ids and a number added to the score of its last token when the others precede.",
        [[[1234], -2.5]],
    ),
    "renormalize_logits": (_BOOLEAN, "Normalise the scores after all processing.", False),
    "forced_bos_token_id": (_TOKEN, "The token that the answer must begin with.", 1234),
    "forced_eos_token_id": (
        {"oneOf": [_TOKEN, _TOKENS]},
        "The token (or one of those) that a sequence must end with when it reaches its largest length.",
        32007,
    ),
    "remove_invalid_values": (_BOOLEAN, "Replace NaN and infinite logits before choosing.", False),
    "exponential_decay_length_penalty": (
        {"type": "array", "minItems": 2, "maxItems": 2, "items": _NUMBER},
        "`[start, factor]`: after `start` new tokens, ending becomes likelier by `factor` to the power of their count.",
        [50, 1.05],
    ),
    "suppress_tokens": (_TOKENS, "Tokens that are never generated.", [1234]),
    "begin_suppress_tokens": (_TOKENS, "Tokens that the answer does not begin with.", [1234]),
    "output_scores": (
        _BOOLEAN,
        "With `return_dict_in_generate`: also return the score and log-probability of each token.",
        False,
    ),
    "return_dict_in_generate": (_BOOLEAN, "Also return token ids, beam scores and token counts.", False),
    "bos_token_id": (_TOKEN, "The token that an empty prompt starts with. Default: the model's.", 1),
    "eos_token_id": (
        {"oneOf": [{"type": "integer", "minimum": -1}, {"type": "array", "items": {"type": "integer", "minimum": -1}}]},
        "The token (or tokens) that end a sequence; -1: none. Default: the model's.",
        32007,
    ),
    "pad_token_id": (_TOKEN, "The token that finished sequences are padded with. Default: the model's.", 32000),
    "seed": (
        _integer(0, 2**64 - 1),
        "Makes sampling repeatable: the same request with the same seed gives the same answer. null: a new one.",
        42,
    ),
}


def default_of(name: str) -> object:
    """Give what a request means where it does not name a parameter, or None where that is the model's affair."""
    default = API_DEFAULTS.get(name, PARAMETERS[name].default)
    return list(default) if isinstance(default, tuple) else default


def generate_kwargs_schema() -> Schema:
    """Give the JSON schema of ``generate_kwargs``."""
    return {
        "title": "GenerateKwargs",
        "type": "object",
        "description": "The parameters of generation, with the meaning that they have in transformers' `generate`. "
        'null stands for "not set". What is not listed is refused by name.',
        "properties": {name: _property(name) for name in PARAMETERS},
        "patternProperties": {f"^({'|'.join(REFUSED)})$": {"type": "null", "description": "Not supported; null is."}},
        "additionalProperties": False,
    }


def _property(name: str) -> Schema:
    schema, meaning, example = _DESCRIBED[name]
    described: Schema = {"anyOf": [schema, {"type": "null"}], "description": meaning, "examples": [example]}
    default = default_of(name)
    if default not in (None, []):
        described["default"] = default
    return described
