"""Every generation parameter, once: its type and range, defaults, meaning, and how it is computed.

The names, types and defaults are those of ``transformers.GenerationConfig`` 4.49.0, with `seed` and OpenAI's own added.
Validation, the OpenAPI document, ``docs/parameters.md`` and the playground's panel are made from this table: a new
parameter is one entry here, and the code that honours it. Rules between parameters are in
`edge_phi3.generation.config`, names of transformers that are refused in ``refused.json``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Final, Literal

from edge_phi3.generation.values import (
    BIASES,
    BOOLEAN,
    EARLY_STOPPING,
    END_TOKENS,
    PHRASES,
    REFUSED,
    START_AND_FACTOR,
    TEXTS,
    TOKEN,
    TOKEN_OR_TOKENS,
    TOKENS,
    Parameter,
    Schema,
    Source,
    Value,
    integer,
    number,
    parameter,
)

_essential = partial(parameter, "Essentials")
_length = partial(parameter, "Length and time")
_sampling = partial(parameter, "Sampling")
_beams = partial(parameter, "Beam search")
_repetition = partial(parameter, "Repetition")
_tokens = partial(parameter, "Tokens")
_response = partial(parameter, "Response")
_openai = partial(parameter, "OpenAI's API", openai=True)

_POSITIVE = number(exclusiveMinimum=0)
_PROBABILITY = number(minimum=0, maximum=1)
_CUTOFF = number(minimum=0, exclusiveMaximum=1, hint="0 switches it off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The table; each attribute is the parameter of its name.

    A parameter that is off holds the value that switches it off (`temperature` 1, `top_k` 0, `min_p` None, an empty
    tuple, ...).
    """

    max_new_tokens: int | None = _essential(
        Value(integer(1), None, example=64),
        "The most tokens generated for a sequence, the prompt not included.",
        "Takes precedence over `max_length`.",
    )
    do_sample: bool = _essential(
        Value(BOOLEAN, False, api=True, example=False),
        "true draws each token from its distribution; false takes the likeliest.",
        "With `num_beams` above 1, true samples the beams.",
    )
    temperature: float = _essential(
        Value(
            number(exclusiveMinimum=0, hint="set `do_sample` to false for greedy decoding"),
            1.0,
            api=1.0,
            with_sampling=True,
        ),
        "Divides the logits before sampling: below 1 favours likely tokens, above 1 evens the distribution out.",
    )
    top_k: int = _essential(
        Value(integer(0, hint="0 switches it off"), 50, api=10, null=0, with_sampling=True),
        "Samples from the k likeliest tokens; 0 switches it off.",
        "Tokens whose score equals that of the last one kept stay too.",
    )
    top_p: float = _essential(
        Value(_PROBABILITY, 1.0, api=1.0, with_sampling=True),
        "Samples from the smallest set of likeliest tokens whose probabilities add up to this (nucleus sampling).",
        "1 switches it off.",
    )
    min_p: float | None = _essential(
        Value(_PROBABILITY, None, example=0.05, with_sampling=True),
        "Samples from the tokens whose probability is at least this fraction of the likeliest token's.",
    )
    repetition_penalty: float = _essential(
        Value(_POSITIVE, 1.0, api=1.0, example=1.1),
        "Above 1 makes tokens that have already occurred, in the prompt or the answer, less likely; 1 switches it off.",
        "Divides their positive scores and multiplies their negative ones.",
    )
    stop_strings: tuple[str, ...] = _essential(
        Value(TEXTS, (), example=["\n\n"]),
        "Ends a sequence as soon as one of these strings appears in it.",
        "The token that completes it is kept whole. Strings are matched against the texts of single tokens, so a"
        " character that is spelt in byte tokens never matches. A beam search stops when every beam ends with one.",
    )
    seed: int | None = _essential(
        Value(integer(-1, 2**64 - 1), None, example=42),
        "Random seed; the same request with the same seed gives the same answer. null and -1 draw a new one.",
        "Up to the model's rounding; see [Random draws](#random-draws).",
    )
    max_length: int | None = _length(
        Value(integer(1), None, api=200, null=Source.INHERIT),
        "The most tokens of a sequence, prompt included. `max_new_tokens` takes precedence.",
        "A prompt that reaches it is refused. Set nowhere, it allows 20 new tokens.",
    )
    min_new_tokens: int | None = _length(
        Value(integer(0), None, example=8),
        "The fewest tokens generated for a sequence before it may end.",
        "Takes precedence over `min_length`.",
    )
    min_length: int = _length(
        Value(integer(0), 0, api=0),
        "The fewest tokens of a sequence, prompt included, before it may end.",
    )
    max_time: float | None = _length(
        Value(number(minimum=0), None, example=30.0),
        "Seconds after which no further token is generated.",
        "Counted from the moment the request is queued.",
    )
    prompt_lookup_num_tokens: int | None = _length(
        Value(integer(0, 64), None, example=8),
        "Drafts so many tokens from what followed the same words earlier in the text, and checks them in one step.",
        "Changes the speed alone. null leaves it to `--speculation`, 0 drafts none; not with beams.",
    )
    num_return_sequences: int = _sampling(
        Value(integer(1), 1, null=Source.INHERIT),
        "How many sequences are returned.",
        "1 with greedy decoding, and at most `num_beams` with beams.",
    )
    typical_p: float = _sampling(
        Value(number(exclusiveMinimum=0, maximum=1), 1.0, api=1.0, with_sampling=True),
        "Samples from the tokens whose information is closest to the entropy, up to this total probability.",
        "1 switches it off ([paper](https://arxiv.org/abs/2202.00666)).",
    )
    epsilon_cutoff: float = _sampling(
        Value(_CUTOFF, 0.0, example=0.0003, with_sampling=True),
        "Samples from the tokens with at least this probability; 0 switches it off.",
        "[Paper](https://arxiv.org/abs/2210.15191).",
    )
    eta_cutoff: float = _sampling(
        Value(_CUTOFF, 0.0, example=0.0006, with_sampling=True),
        "Like `epsilon_cutoff`, with a threshold that falls as the entropy grows; 0 switches it off.",
    )
    renormalize_logits: bool = _sampling(
        Value(BOOLEAN, False),
        "Normalises the scores (log-softmax) after all other processing.",
    )
    num_beams: int = _beams(
        Value(integer(1), 1, api=1),
        "The number of beams; 1 switches beam search off.",
    )
    num_beam_groups: int = _beams(
        Value(integer(1), 1, null=Source.INHERIT),
        "Divides the beams into groups that are penalised for choosing the same tokens.",
        "Must divide `num_beams`, and needs `do_sample` false.",
    )
    diversity_penalty: float | None = _beams(
        Value(number(), 0.0, null=None),
        "Subtracted from the score of a token for each beam of an earlier group that chose it in the same step.",
        "Must not be 0 with groups; below 0 it has no effect.",
    )
    length_penalty: float = _beams(
        Value(number(), 1.0, null=Source.INHERIT),
        "The power of the length by which a beam's score is divided: above 0 favours long answers, below 0 short ones.",
        "The score is the sum of the log-probabilities, the length the number of new tokens.",
    )
    early_stopping: bool | Literal["never"] = _beams(
        Value(EARLY_STOPPING, False, api=False, null=Source.INHERIT),
        "When a beam search ends: true, with `num_beams` finished candidates; false, when better ones are unlikely;"
        ' "never", when better ones are impossible.',
        "With false, it ends when the best open beam, at its present length, is no better than the worst finished one.",
    )
    no_repeat_ngram_size: int = _repetition(
        Value(integer(0), 0, example=3),
        "No run of this many tokens occurs twice in a sequence, prompt included; 0 switches it off.",
    )
    encoder_repetition_penalty: float = _repetition(
        Value(_POSITIVE, 1.0),
        "Above 1 makes the prompt's tokens likelier; 1 switches it off.",
        "For one sequence only: with several, transformers 4.49.0 applies it to the first alone.",
    )
    encoder_no_repeat_ngram_size: int = _repetition(
        Value(integer(0), 0),
        "No run of this many tokens of the prompt occurs in the answer; 0 switches it off.",
    )
    bad_words_ids: tuple[tuple[int, ...], ...] = _tokens(
        Value(PHRASES, (), example=[[1234], [56, 78]]),
        "Sequences of token ids that are never generated.",
        "Bans the last token of each where the others precede it. An end token by itself is not banned.",
    )
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = _tokens(
        Value(BIASES, (), example=[[[1234], -2.5]]),
        "Pairs of token ids and a number that is added to the score of the last token where the others precede it.",
    )
    suppress_tokens: tuple[int, ...] = _tokens(
        Value(TOKENS, (), example=[1234]),
        "Tokens that are never generated.",
        "Ids outside the vocabulary have no effect.",
    )
    begin_suppress_tokens: tuple[int, ...] = _tokens(
        Value(TOKENS, (), example=[1234]),
        "Tokens that the answer does not begin with.",
        "Ids outside the vocabulary have no effect.",
    )
    forced_bos_token_id: int | None = _tokens(
        Value(TOKEN, None, example=1234),
        "The first token of the answer to a prompt of one token.",
    )
    forced_eos_token_id: tuple[int, ...] = _tokens(
        Value(TOKEN_OR_TOKENS, (), example=32007),
        "The token (or one of the tokens) that a sequence ends with when it reaches its maximum length.",
    )
    exponential_decay_length_penalty: tuple[int, float] | None = _tokens(
        Value(START_AND_FACTOR, None, example=[50, 1.05]),
        "`[start, factor]`: after `start` new tokens, ending becomes likelier with every token.",
        "The scores of end tokens grow by `factor` to the power of the tokens since. Needs an end token.",
    )
    bos_token_id: int | None = _tokens(
        Value(TOKEN, Source.MODEL, null=Source.INHERIT, example=1),
        "The token that an empty prompt starts with; the model's unless set.",
    )
    eos_token_id: tuple[int, ...] = _tokens(
        Value(END_TOKENS, Source.MODEL, null=Source.INHERIT, example=32007),
        "The token (or tokens) that end a sequence; -1 for none; the model's unless set.",
        "`[]` means none too.",
    )
    pad_token_id: int | None = _tokens(
        Value(TOKEN, Source.MODEL, null=Source.INHERIT, example=32000),
        "The token that finished sequences are padded with; the model's unless set.",
        "Responses hold no padding; in group beam search, groups that have finished count as choosing it.",
    )
    return_dict_in_generate: bool = _response(
        Value(BOOLEAN, False),
        "Also returns token ids, beam scores and token counts.",
        "See [the API](api.md).",
    )
    output_scores: bool = _response(
        Value(BOOLEAN, False),
        "With `return_dict_in_generate`, also returns the score and log-probability of each token.",
        "The processed score and its log-softmax; in beam searches the transition score, twice. An end token that is"
        " appended to a beam which `stop_strings` or `max_time` cut off has none.",
    )
    remove_invalid_values: bool = _response(
        Value(BOOLEAN, False),
        "Replaces NaN and infinite logits before a token is chosen.",
        "NaN becomes 0, infinities become the largest finite numbers.",
    )
    presence_penalty: float = _openai(
        Value(number(minimum=-2, maximum=2), 0.0),
        "Subtracted from the logits of tokens that have been generated before.",
    )
    frequency_penalty: float = _openai(
        Value(number(minimum=-2, maximum=2), 0.0),
        "Subtracted from the logit of a token once for each time that it has been generated.",
    )
    repeat_penalty: float = _openai(
        Value(_POSITIVE, 1.0),
        "`repetition_penalty` over the last `repeat_last_n` tokens only; 1 switches it off.",
    )
    repeat_last_n: int = _openai(
        Value(integer(-1), 64),
        "How many of the last tokens, prompt included, `repeat_penalty` looks at; -1: all.",
    )
    cache_prompt: bool = _openai(
        Value(BOOLEAN, True),
        "Whether the prompt may begin with what was computed before.",
    )
    top_logprobs: int | None = _openai(
        Value(integer(0, 20), None, example=3),
        "The number of likeliest tokens that are returned at each position, with their log-probabilities.",
        "Those of the model's own logits, before any processing.",
    )


_ALL: Final[Mapping[str, Parameter]] = {each.name: each.metadata["parameter"] for each in fields(Parameters)}

PARAMETERS: Final = {name: each for name, each in _ALL.items() if not each.openai}
"""What ``generate_kwargs`` may hold, by name."""

OPENAI_PARAMETERS: Final = {name: each for name, each in _ALL.items() if each.openai}
"""What belongs to OpenAI's API alone, by name."""

API_DEFAULTS: Final[Mapping[str, object]] = {
    name: each.value.api for name, each in PARAMETERS.items() if each.value.api is not Source.UNSET
}
"""What a request means where it is silent. These win over the model's ``generation_config.json``."""


def generate_kwargs_schema() -> Schema:
    """Return the JSON schema of ``generate_kwargs``."""
    return {
        "title": "GenerateKwargs",
        "type": "object",
        "description": "The parameters of generation, with the meaning that they have in transformers' `generate`. "
        'null stands for "not set". Any name that is not listed is refused.',
        "properties": {name: each.json_schema() for name, each in PARAMETERS.items()},
        "patternProperties": {f"^({'|'.join(REFUSED)})$": {"type": "null", "description": "Not supported."}},
        "additionalProperties": False,
    }


def groups(parameters: Mapping[str, Parameter] = PARAMETERS) -> dict[str, list[str]]:
    """Return the names of the parameters of each group, in the table's order."""
    found: dict[str, list[str]] = {}
    for name, each in parameters.items():
        found.setdefault(each.group, []).append(name)
    return found
