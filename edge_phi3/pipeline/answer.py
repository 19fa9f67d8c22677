"""What comes out: text that becomes certain while tokens come in, and at last the whole answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta, Struct

from edge_phi3.engine.sequence import Timing
from edge_phi3.engine.token_offsets import PlacedLogprobs
from edge_phi3.engine.tokenizer import clean_up_tokenization
from edge_phi3.generation.decoding import TokenScore
from edge_phi3.pipeline.prompt import PreparedPrompt

_LONGEST_ARTEFACT = 4
"""Characters of the longest text that `clean_up_tokenization` shortens, such as " n't"."""


class ModelCard(Struct, frozen=True):
    """The model that answers."""

    name: Annotated[str, Meta(description="The file's name without its ending.")]
    description: Annotated[str, Meta(description="Architecture, size and type.", examples=["phi3 3B Q4_K - Medium"])]
    file: str
    parameters: int
    size: Annotated[int, Meta(description="Bytes of all its tensors.")]
    context_length: Annotated[int, Meta(description="Tokens that it was trained for.")]
    vocab_size: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of text of the returned sequence `index`, which never splits a character.

    It may be empty where log-probabilities are wanted: `placed` are the tokens whose places have become certain, in
    order.
    """

    index: int
    text: str
    placed: Sequence[PlacedLogprobs] = ()


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """An answer.

    Attributes:
        text: the texts of all returned sequences, joined.
        texts: one for each.
        finish_reasons: why each ended.
        sequences: token ids of each, prompt included.
        sequences_scores: beam scores, or None outside beam modes.
        scores: score and log-probability of each generated token of each sequence, or None when not wanted.
        completion_tokens: tokens generated, over all sequences.
        cached_tokens: tokens of the prompt that came from the prefix cache.
        drafted_tokens: tokens that were drafted, over all sequences.
        accepted_tokens: those of them that the model chose.
        logprobs: of each token of each sequence that is part of its text, or None when not wanted.
        prompt_logprobs: of each token of the prompt, placed in the text in front of the answers; the first token's is
            NaN. None when not wanted; else `logprobs` has every token.
    """

    text: str
    texts: list[str]
    finish_reasons: list[str]
    sequences: list[list[int]]
    sequences_scores: list[float] | None
    scores: list[list[TokenScore]] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    timing: Timing
    logprobs: list[list[PlacedLogprobs]] | None = None
    prompt_logprobs: list[PlacedLogprobs] | None = None


class TextStream:
    """The new text of one sequence, the prompt's own left out, as it becomes certain; `sent` counts its characters."""

    def __init__(self, prepared: PreparedPrompt) -> None:
        prompt = prepared.text.whole
        self._decoder = prepared.text.decoder.copy()
        self._clean_up = prepared.clean_up
        self._text = prepared.text.certain
        self._prompt_length = len(clean_up_tokenization(prompt) if prepared.clean_up else prompt)
        self.sent = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Take tokens, and give the new text that no later token can change."""
        new = self._decoder.push(tokens)
        if not new:
            return ""
        self._text += new
        certain = self._text
        if self._clean_up:
            certain = clean_up_tokenization(certain)
            # An artefact begins with a space; what stands before the last one near the end cannot change any more.
            space = certain.rfind(" ", max(0, len(certain) - _LONGEST_ARTEFACT))
            certain = certain if space < 0 else certain[:space]
        text = certain[self._prompt_length + self.sent :]
        self.sent += len(text)
        return text


def overlap(text: str, wanted: str) -> int:
    """Return the length of the longest end of a text that another begins with, which is longer."""
    longest = min(len(text), len(wanted) - 1)
    return next((length for length in range(longest, 0, -1) if wanted.startswith(text[-length:])), 0)
