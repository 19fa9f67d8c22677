"""`GenerationConfig`: the parameters of one request, merged, typed and validated."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from edge_phi3.generation.parameters import API_DEFAULTS, PARAMETERS, Parameters
from edge_phi3.generation.values import LONGEST_SHOWN, REFUSED, ParameterError, Source, leaves, shown

DEFAULT_NEW_TOKENS: Final = 20
"""Tokens generated when nothing bounds the length (the default ``max_length`` of transformers, past the prompt)."""
MOST_PHRASES: Final = 1024
LONGEST_STOP: Final = 4096
"""How many phrases or stop strings of a request are looked for at every token, and characters of one such string."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDefaults:
    """What a model says about generation.

    Attributes:
        vocab_size: rows of the output matrix; token ids lie below it.
        context_length: ``max_position_embeddings``.
        generation: the model's ``generation_config.json``, parsed. Names that transformers does not know are
            ignored, as it does.
        max_sequences: how many sequences one request may hold at once (beams, or returned sequences).
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    context_length: int
    generation: Mapping[str, object] = field(default_factory=dict)
    max_sequences: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig(Parameters):
    """Every parameter of one request, merged and validated. Follows the class of the same name in transformers.

    `resolve` leaves OpenAI's own parameters off: whoever speaks OpenAI's API replaces them. The two beside them are the
    model's.
    """

    vocab_size: int
    context_length: int

    @classmethod
    def resolve(cls, requested: Mapping[str, object], defaults: ModelDefaults) -> GenerationConfig:
        """Merge a request's ``generate_kwargs``, as parsed from JSON, over what holds where they are silent.

        The order is the original service's: a name in the request wins, then the API's default, then the
        model's file, then transformers. A null in the request stands for "not set".

        Raises:
            ParameterError: a name is unknown or unsupported, a value has the wrong type or is out of range,
                or two parameters contradict each other where transformers refuses them.
        """
        for name, value in requested.items():
            if name not in PARAMETERS:
                _refuse_unsupported(name, value)
        for name, value in defaults.generation.items():
            refused = REFUSED.get(name)
            if refused is not None and refused.changes_tokens and not refused.accepts(value):
                source = "The model's generation_config.json sets"
                raise ParameterError(name, f"{source} `{name}`, which is not supported: {refused.reason}.")
        values = {name: _merged(name, requested, defaults) for name in PARAMETERS}
        if values["max_length"] == DEFAULT_NEW_TOKENS and requested.get("max_length") is None:
            values["max_length"] = None
        if values["seed"] == -1:
            values["seed"] = None
        config = cls(vocab_size=defaults.vocab_size, context_length=defaults.context_length, **values)
        _validate(config, requested, defaults)
        return config

    @property
    def is_beam_search(self) -> bool:
        """Whether beams are searched, rather than sequences continued one by one."""
        return self.num_beams > 1

    @property
    def records_scores(self) -> bool:
        """Whether the reply holds the score of each token."""
        return self.return_dict_in_generate and self.output_scores

    def total_length(self, prompt_length: int) -> int:
        """Return the largest length of a sequence, prompt included; `ParameterError` where no token has room.

        ``max_new_tokens`` wins over ``max_length``. With neither set, `DEFAULT_NEW_TOKENS` are added to the
        prompt, up to the context length.
        """
        if self.max_new_tokens is not None:
            return prompt_length + self.max_new_tokens
        total = self.max_length
        if total is None:
            total = min(prompt_length + DEFAULT_NEW_TOKENS, self.context_length)
        if total > prompt_length:
            return total
        message = (
            f"The prompt has {prompt_length} tokens, which leaves no room in the model's context of"
            f" {self.context_length}: shorten the prompt."
        )
        if self.max_length is not None:
            message = (
                f"`max_length` is {self.max_length}, but the prompt alone has {prompt_length} tokens: give a"
                " larger `max_length`, or `max_new_tokens`, or a shorter prompt."
            )
        raise ParameterError("max_length", message)

    def least_length(self, prompt_length: int) -> int:
        """Return the length, prompt included, below which no sequence may end."""
        if self.min_new_tokens is not None:
            return prompt_length + self.min_new_tokens
        return self.min_length


def _refuse_unsupported(name: str, value: object) -> None:
    if (refused := REFUSED.get(name)) is None:
        # Compared with all names there are, which takes long for a long one.
        near = difflib.get_close_matches(name, PARAMETERS, n=1) if len(name) <= LONGEST_SHOWN else []
        hint = f" Did you mean `{near[0]}`?" if near else ""
        name = name if len(name) <= LONGEST_SHOWN else name[: LONGEST_SHOWN - 3] + "..."
        raise ParameterError(name, f"`{name}` is not a generation parameter.{hint}")
    if not refused.accepts(value):
        raise ParameterError(name, f"`{name}` is not supported: {refused.reason}.")


def _merged(name: str, requested: Mapping[str, object], defaults: ModelDefaults) -> Any:
    parameter = PARAMETERS[name]
    value = requested.get(name)
    if value is not None:
        return parameter.read(name, value)
    if name in requested and parameter.null is not Source.INHERIT:
        return parameter.null
    if name in API_DEFAULTS and name not in requested:
        return API_DEFAULTS[name]
    if parameter.value.default is Source.MODEL:
        return getattr(defaults, "eos_token_ids" if name == "eos_token_id" else name)
    value = defaults.generation.get(name)
    if value is None:
        keeps_default = name not in defaults.generation or parameter.null is Source.INHERIT
        return parameter.value.default if keeps_default else parameter.null
    try:
        return parameter.read(name, value)
    except ParameterError as error:
        raise ParameterError(name, f"In the model's generation_config.json: {error}") from error


def _validate(config: GenerationConfig, requested: Mapping[str, object], defaults: ModelDefaults) -> None:
    for name, broken, rule in _rules(config, requested, defaults.max_sequences):
        if broken:
            raise ParameterError(name, f"`{name}` is {shown(getattr(config, name))}, but {rule}.")
    for name, parameter in PARAMETERS.items():
        value, kind = getattr(config, name), parameter.value.kind
        if parameter.value.with_sampling and config.do_sample:
            kind.check(name, value)
        for token in leaves(value) if kind.token_ids else ():
            if isinstance(token, int) and token >= config.vocab_size:
                rule = f"must hold token ids below {config.vocab_size}, the size of the vocabulary"
                raise ParameterError(name, f"`{name}` is {shown(token)}, but {rule}.")


def _rules(config: GenerationConfig, requested: Mapping[str, object], most: int) -> list[tuple[str, bool, str]]:
    """Return the rules between parameters: the one to blame, whether the rule is broken, and what it says."""
    groups, beams, returned = config.num_beam_groups, config.num_beams, config.num_return_sequences
    penalty, searched, grouped = config.diversity_penalty or 0, beams > 1, beams > 1 and groups > 1
    several = max(beams, returned) > 1
    # A null `do_sample` chooses greedily too, but transformers lets it return several (equal) sequences.
    greedy = not config.do_sample and requested.get("do_sample", False) is not None
    too_many = f"must be at most {most}, the sequences one request may hold"
    no_sampling = "when `do_sample` is true: group beam search does not sample"
    with_groups = "with `num_beam_groups` above 1, or the groups are equal"
    when_greedy = "for greedy decoding: set `do_sample` or `num_beams`"
    when_several = "with several beams or sequences"
    phrases = [phrase for phrase in config.bad_words_ids if len(phrase) > 1]
    biased = [phrase for phrase, _ in config.sequence_bias if len(phrase) > 1]
    stops = config.stop_strings
    decays = config.exponential_decay_length_penalty is not None
    ends = bool(config.eos_token_id) and min(config.eos_token_id) >= 0
    few = f"must hold at most {MOST_PHRASES} phrases of several tokens, each of which is looked for at every token"
    short = f"must hold at most {MOST_PHRASES} strings of up to {LONGEST_STOP} characters"
    return [
        ("bad_words_ids", len(phrases) > MOST_PHRASES, few),
        ("sequence_bias", len(biased) > MOST_PHRASES, few),
        ("stop_strings", len(stops) > MOST_PHRASES or any(len(stop) > LONGEST_STOP for stop in stops), short),
        ("num_beams", beams > most, too_many),
        ("num_return_sequences", returned > most, too_many),
        ("num_beam_groups", grouped and config.do_sample, f"must be 1 {no_sampling}"),
        ("num_beam_groups", searched and beams % groups > 0, f"must divide `num_beams` ({beams})"),
        ("diversity_penalty", grouped and config.diversity_penalty == 0, f"must be above 0 {with_groups}"),
        ("diversity_penalty", searched and penalty != 0 and config.do_sample, f"must be 0 {no_sampling}"),
        ("diversity_penalty", searched and penalty != 0 and groups == 1, "needs `num_beam_groups` above 1"),
        ("diversity_penalty", not searched and penalty > 0, "needs `num_beams` and `num_beam_groups` above 1"),
        ("num_return_sequences", 1 < beams < returned, f"must be at most `num_beams` ({beams})"),
        ("num_return_sequences", beams == 1 < returned and greedy, f"must be 1 {when_greedy}"),
        ("prompt_lookup_num_tokens", searched and bool(config.prompt_lookup_num_tokens), "must be 0 with beams"),
        # transformers 4.49.0 means all rows, but reaches only the first.
        ("encoder_repetition_penalty", several and config.encoder_repetition_penalty != 1, f"must be 1 {when_several}"),
        ("exponential_decay_length_penalty", decays and not ends, "needs an `eos_token_id` to favour"),
    ]
