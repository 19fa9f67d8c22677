"""What goes in: a request's prompt as tokens, with all that its answer needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.detokenizer import DecodedPrompt
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.constraints import TokenConstraint
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

    def with_config(self, **changes: Any) -> PreparedPrompt:
        """Return the same prompt with other generation parameters."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))
