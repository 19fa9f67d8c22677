"""What is shown of an answer: its text up to a stop text, and the log-probabilities of its tokens."""

import math
from collections.abc import Iterable, Sequence

from edge_phi3.api.openai.schemas import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from edge_phi3.engine.token_offsets import PlacedLogprobs
from edge_phi3.pipeline import TextGenerationPipeline
from edge_phi3.pipeline.answer import overlap

_IMPOSSIBLE = -9999.0
"""What OpenAI returns for a token that is not among the likeliest, and this service for one without any probability."""


class ShownText:
    """Passes text on as far as it cannot belong to a stop text, and tokens as their text is shown.

    No stop text is empty. Once one is met, `stopped` is true, and nothing more is passed on; with `include`, it is
    passed on itself.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self._tokens: list[PlacedLogprobs] = []
        self._length = 0
        self.stopped = False

    def push(self, text: str, *, last: bool = False) -> str:
        """Take new text, and return what is certain not to be part of a stop text: all of it where no more comes."""
        if self.stopped:
            return ""
        held = self._held + text
        places = [(place, place + len(stop) * self._include) for stop in self._stops if (place := held.find(stop)) >= 0]
        self.stopped = bool(places)
        kept = 0 if last else max((overlap(held, stop) for stop in self._stops), default=0)
        end = min(places, default=(0, len(held) - kept))[1]
        self._held = held[end:]
        self._length += end
        return held[:end]

    def push_tokens(self, tokens: Iterable[PlacedLogprobs]) -> None:
        """Take the next tokens."""
        self._tokens += tokens

    def tokens(self) -> list[PlacedLogprobs]:
        """Return the tokens, not returned before, that begin in the text passed on; the last may be shown in part."""
        shown = [token for token in self._tokens if token.start < self._length]
        self._tokens = self._tokens[len(shown) :]
        return shown


def chat_logprobs(pipeline: TextGenerationPipeline, placed: Iterable[PlacedLogprobs]) -> ChatLogprobs:
    """Return them in the shape of chat completions."""

    def described(token: int, logprob: float) -> tuple[str, float, list[int]]:
        data = pipeline.tokenizer.bytes_of(token)
        return _text(data), _finite(logprob), list(data)

    return ChatLogprobs(
        [
            TokenLogprob(
                *described(token.token_id, token.logprob), [TopLogprob(*described(*each)) for each in token.top]
            )
            for _, token in placed
        ]
    )


def completion_logprobs(
    pipeline: TextGenerationPipeline, placed: Iterable[PlacedLogprobs], *, whole: bool = False
) -> CompletionLogprobs:
    """Return them in the shape of completions, whose likeliest tokens always hold the chosen one.

    With `whole` the first token is a prompt's, which follows none: it has no log-probability.
    """
    found = CompletionLogprobs([], [], [], [])
    for start, token in placed:
        text = _text(pipeline.tokenizer.bytes_of(token.token_id))
        found.tokens.append(text)
        found.token_logprobs.append(_finite(token.logprob))
        found.text_offset.append(start)
        top: dict[str, float] = {}
        for other, logprob in token.top:
            # Two tokens may have one text; the likelier stays.
            top.setdefault(_text(pipeline.tokenizer.bytes_of(other)), _finite(logprob))
        top.setdefault(text, _finite(token.logprob))
        found.top_logprobs.append(top)
    if whole:
        found.token_logprobs[0] = found.top_logprobs[0] = None
    return found


def _text(data: bytes) -> str:
    """Return the text of a token; one that is a part of a character is written as OpenAI writes it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
