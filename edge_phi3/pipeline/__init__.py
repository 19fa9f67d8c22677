"""Text in, text out: what transformers' text-generation pipeline does around ``generate``."""

from edge_phi3.pipeline.answer import GenerationOutput, ModelCard, TextDelta
from edge_phi3.pipeline.pipeline import TextGenerationPipeline
from edge_phi3.pipeline.prompt import PreparedPrompt, PromptError

__all__ = [
    "GenerationOutput",
    "ModelCard",
    "PreparedPrompt",
    "PromptError",
    "TextDelta",
    "TextGenerationPipeline",
]
