"""What goes in: a request's prompt as tokens, with all that its answer needs."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.tokenizer import DecodedPrompt
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.constrained import TokenConstraint
from edge_phi3.generation.parameters import API_DEFAULTS
from edge_phi3.generation.stopping import StopTexts


class PromptError(EdgePhi3Error):
    """The prompt cannot be used as it is."""


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A request that has been checked and turned into tokens.

    Attributes:
        prompt_ids: token ids, int32, shape ``(prompt_tokens,)``.
        text: what they are as text.
        config: the resolved generation parameters.
        lead: text that each answer begins with: the prompt when the full text is returned, else nothing.
        clean_up: whether spaces before punctuation are removed.
        constraint: what the answers are held to, or None.
        stop_texts: what ends an answer by its text beside the configuration's ``stop_strings``, or None.
        scored: how many likeliest tokens are wanted beside each token of the prompt; None for no log-probabilities.
        only_scored: whether the prompt alone is wanted, and nothing of what is generated.
        adapter: the place of what answers in `TextGenerationPipeline.names`.
    """

    prompt_ids: NDArray[np.int32]
    text: DecodedPrompt
    config: GenerationConfig
    lead: str
    clean_up: bool
    constraint: TokenConstraint | None = None
    stop_texts: StopTexts | None = None
    scored: int | None = None
    only_scored: bool = False
    adapter: int = 0

    def with_config(self, **changes: Any) -> Self:
        """Return the same prompt with other generation parameters."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))


def make_room_for_prefix(kwargs: dict[str, object], prefix_tokens: int) -> None:
    """Let the lengths in generation parameters, which count a prompt, count the prefix before it too."""
    for name, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = kwargs.get(name, API_DEFAULTS[name])
        if kwargs.get(new_tokens) is None and isinstance(value, int) and not isinstance(value, bool):
            kwargs[name] = value + prefix_tokens


def cut_hole(prompt_ids: NDArray[np.int32], config: GenerationConfig, longest: int) -> NDArray[np.int32]:
    """Return the end of a prompt that leaves room for new tokens in `longest`; `PromptError` where there is none."""
    length = len(prompt_ids)
    new_tokens = config.max_new_tokens
    if new_tokens is None:
        new_tokens = config.total_length(length) - length
    if length + new_tokens <= longest:
        return prompt_ids
    if new_tokens >= longest:
        raise PromptError(
            f"handle_long_generation 'hole' cannot make room: {new_tokens} new tokens are wanted in a context of "
            f"{longest}."
        )
    return prompt_ids[new_tokens - longest :]
