"""OpenAI's parameters in the words of ``generate()``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.openai.schemas import ChatCompletionMessage, ChatCompletionRequest, CompletionRequest, SamplingFields

_MOST_STOPS = 4
_MOST_BIAS = 100.0

_TEXT_ONLY = "this model reads and writes text only"
_NO_TOOLS = "this service does not call tools; put their description into the conversation"

UNSUPPORTED: Final[Mapping[str, tuple[str, tuple[object, ...]]]] = {
    "tools": (_NO_TOOLS, ([],)),
    "tool_choice": (_NO_TOOLS, ("none", "auto")),
    "functions": (_NO_TOOLS, ([],)),
    "function_call": (_NO_TOOLS, ("none", "auto")),
    "modalities": (_TEXT_ONLY, (["text"],)),
    "audio": (_TEXT_ONLY, ()),
    "prediction": ("no predicted output is taken", ()),
    "reasoning_effort": ("this model does not reason apart from its answer", ("none",)),
    "verbosity": ("ask for a short or long answer in the conversation", ("medium",)),
    "web_search_options": ("this service does not search the web", ()),
    "store": ("nothing is stored", (False,)),
    "suffix": ("this model continues a text and does not fill gaps", ("",)),
}
"""Fields that are refused, why, and the values (beside null) that ask for nothing."""


def refuse_unsupported(request: SamplingFields | ChatCompletionMessage, where: str = "") -> None:
    """Raise `InvalidRequestError` for a field that wants what this service does not have."""
    for name, (reason, harmless) in UNSUPPORTED.items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            raise InvalidRequestError(f"`{where}{name}` is not supported: {reason}.")


def messages_of(request: ChatCompletionRequest) -> list[dict[str, str]]:
    """Return a conversation as the pipeline takes it.

    Raises:
        InvalidRequestError: a message holds something else than text.
    """
    return [_message(f"messages[{index}].", message) for index, message in enumerate(request.messages)]


def _message(where: str, message: ChatCompletionMessage) -> dict[str, str]:
    for name in ("audio", "tool_calls", "function_call"):
        if getattr(message, name):
            raise InvalidRequestError(f"`{where}{name}` is not supported: {_TEXT_ONLY}.")
    content = message.content
    if content is None:
        raise InvalidRequestError(f"`{where}content` must be a text or a list of text parts, but is null.")
    if isinstance(content, list):
        for index, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise InvalidRequestError(
                    f"`{where}content[{index}]` has the type {part.type[:40]!r}, which is not supported: {_TEXT_ONLY}."
                )
        content = "".join(part.text or "" for part in content)
    return {"role": "system" if message.role == "developer" else message.role, "content": content}


def stops_of(request: SamplingFields) -> list[str]:
    """Return the texts before which an answer ends."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > _MOST_STOPS or not all(stops):
        raise InvalidRequestError(f"`stop` must be a text or up to {_MOST_STOPS} texts, none of them empty.")
    return stops


def generation_kwargs(request: SamplingFields, max_new_tokens: int) -> dict[str, Any]:
    """Return the parameters of ``generate()`` for a request.

    Args:
        request: the request.
        max_new_tokens: tokens of an answer at most.

    Raises:
        InvalidRequestError: a parameter is out of range.
    """
    temperature = 1.0 if request.temperature is None else request.temperature
    kwargs: dict[str, Any] = {
        # null decodes greedily, and allows several (equal) answers, which false does not.
        "do_sample": True if temperature > 0 else None,
        "temperature": temperature if temperature > 0 else 1.0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": 0,
        "num_return_sequences": request.n or 1,
        "max_length": None,
        "max_new_tokens": max_new_tokens,
        "stop_strings": stops_of(request) or None,
        "sequence_bias": _biases(request) or None,
    }
    if request.seed is not None:
        kwargs["seed"] = request.seed % 2**64
    return kwargs | (request.generate_kwargs or {})


def _biases(request: SamplingFields) -> list[list[Any]]:
    biases: list[list[Any]] = []
    for token, bias in (request.logit_bias or {}).items():
        if not token.isascii() or not token.isdigit():
            raise InvalidRequestError(f"`logit_bias` has the key {token[:40]!r}; its keys are token ids.")
        if not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise InvalidRequestError(
                f"`logit_bias` must lie between -{_MOST_BIAS:g} and {_MOST_BIAS:g}, but is {bias:g}."
            )
        biases.append([[int(token)], float(bias)])
    return biases


def most_tokens(request: SamplingFields) -> int | None:
    """Return how many tokens an answer may have, or None where the request does not say."""
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a request for completions: one or more, each a text or token ids.

    Raises:
        InvalidRequestError: there is none, or they are of several kinds.
    """
    prompt = request.prompt
    if not prompt:
        raise InvalidRequestError("`prompt` is missing.")
    if isinstance(prompt, str):
        return [prompt]
    tokens = [item for item in prompt if isinstance(item, int)]
    if len(tokens) == len(prompt):
        return [tokens]
    prompts: list[str | list[int]] = [item for item in prompt if not isinstance(item, int)]
    if tokens or len({type(item) for item in prompts}) > 1 or not all(prompts):
        raise InvalidRequestError(
            "`prompt` must be a text, token ids, a list of texts or a list of lists of token ids."
        )
    return prompts
