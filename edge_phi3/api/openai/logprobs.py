"""Log-probabilities in OpenAI's two shapes, for exactly the tokens whose text is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable

from edge_phi3.api.openai.schemas import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from edge_phi3.engine.token_offsets import PlacedLogprobs
from edge_phi3.pipeline import TextGenerationPipeline

_IMPOSSIBLE = -9999.0
"""What OpenAI returns for a token that is not among the likeliest, and this service for one without any probability."""


class ShownTokens:
    """The tokens of one answer, passed on as their text is shown.

    Text is held back while it may belong to a stop text, and never shown when it does; so are the tokens. One whose
    text is shown in part is returned.
    """

    def __init__(self) -> None:
        self._waiting: list[PlacedLogprobs] = []
        self._shown = 0

    def push(self, placed: Iterable[PlacedLogprobs]) -> None:
        """Take the next tokens."""
        self._waiting += placed

    def show(self, text: str) -> list[PlacedLogprobs]:
        """Return the tokens that begin in the text that is shown next."""
        self._shown += len(text)
        shown = [placed for placed in self._waiting if placed.start < self._shown]
        self._waiting = self._waiting[len(shown) :]
        return shown


def shown_tokens(placed: Iterable[PlacedLogprobs], text: str) -> list[PlacedLogprobs]:
    """Return the tokens of a whole answer that begin in the text that is shown of it."""
    return [each for each in placed if each.start < len(text)]


def chat_logprobs(pipeline: TextGenerationPipeline, placed: Iterable[PlacedLogprobs]) -> ChatLogprobs:
    """Make the shape of chat completions."""
    content: list[TokenLogprob] = []
    for _, token in placed:
        data = pipeline.token_bytes(token.token_id)
        top = []
        for other, logprob in token.top:
            other_data = pipeline.token_bytes(other)
            top.append(TopLogprob(_text(other_data), _finite(logprob), list(other_data)))
        content.append(TokenLogprob(_text(data), _finite(token.logprob), list(data), top))
    return ChatLogprobs(content)


def completion_logprobs(pipeline: TextGenerationPipeline, placed: Iterable[PlacedLogprobs]) -> CompletionLogprobs:
    """Make the shape of completions, whose likeliest tokens always hold the chosen one."""
    found = CompletionLogprobs([], [], [], [])
    for start, token in placed:
        text = _text(pipeline.token_bytes(token.token_id))
        found.tokens.append(text)
        found.token_logprobs.append(_finite(token.logprob))
        found.text_offset.append(start)
        top: dict[str, float] = {}
        for other, logprob in token.top:
            # Two tokens may have one text; the likelier stays.
            top.setdefault(_text(pipeline.token_bytes(other)), _finite(logprob))
        top.setdefault(text, _finite(token.logprob))
        found.top_logprobs.append(top)
    return found


def _text(data: bytes) -> str:
    """Return the text of a token; one that is a part of a character is written as OpenAI writes it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
