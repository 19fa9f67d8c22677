"""What chat completions and completions say alike about an answer."""

from __future__ import annotations

from typing import Literal

from edge_phi3.api.openai.schemas import CompletionUsage, PromptTokensDetails
from edge_phi3.pipeline import GenerationOutput


def finish_reason_of(reason: str, *, stopped: bool) -> Literal["stop", "length"]:
    """Give OpenAI's word for what ended a sequence.

    Args:
        reason: the engine's word.
        stopped: whether a stop text was met in what was generated.
    """
    return "stop" if stopped or reason in {"stop", "stop_string"} else "length"


def usage_of(*outputs: GenerationOutput) -> CompletionUsage:
    """Add up the tokens of one or more generations."""
    prompt = sum(output.prompt_tokens for output in outputs)
    completion = sum(output.completion_tokens for output in outputs)
    cached = sum(output.cached_tokens for output in outputs)
    return CompletionUsage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
