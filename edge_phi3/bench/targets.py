"""The generation endpoints that the load generator speaks to: how each is asked, and how its answers are read."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import msgspec

from edge_phi3.bench.answers import Answer, EventReader, parse_object
from edge_phi3.bench.errors import BenchError, ExchangeError
from edge_phi3.bench.http_client import HttpClient

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: tokens kept; 0 keeps all.
        top_p: probability mass kept.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, in no server's language.

    Attributes:
        turns: the user's and the assistant's texts in turn, beginning and ending with the user's.
        max_tokens: tokens to generate.
        sampling: how they are chosen.
        ignore_eos: go on to `max_tokens` past end tokens.
        seed: of the sampling, or None for the server's own.
        stream: whether pieces are wanted as they come.
    """

    turns: Sequence[str]
    max_tokens: int
    sampling: Sampling
    ignore_eos: bool
    seed: int | None
    stream: bool


class Target(ABC):
    """A generation endpoint.

    Args:
        client: connections to the server.
        model: the model to name in requests, where the endpoint wants one.
    """

    name: ClassVar[str]
    path: ClassVar[str]

    def __init__(self, client: HttpClient, model: str = "") -> None:
        self.client = client
        self.model = model

    async def generate(self, ask: Ask, answer: Answer) -> None:
        """Send a request and fill `answer` as pieces come in.

        Raises:
            ExchangeError: it failed, or the stream ended early; `answer` keeps what had come.
        """
        body = _encode(self.request(ask))
        if ask.stream:
            await self.client.post(self.path, body, EventReader(answer, self.on_event).feed)
            if not answer.ended:
                raise ExchangeError("The stream ended before the answer did.")
        else:
            self.on_whole(answer, parse_object(await self.client.post_whole(self.path, body)))

    @abstractmethod
    def request(self, ask: Ask) -> Mapping[str, Any]:
        """Return the request's body."""

    @abstractmethod
    def on_event(self, answer: Answer, name: str, data: bytes) -> None:
        """Read one event of a stream."""

    @abstractmethod
    def on_whole(self, answer: Answer, body: Mapping[str, Any]) -> None:
        """Read a response that was not streamed."""

    async def count_tokens(self, text: str) -> int | None:
        """Count a text's tokens as the server does, special ones it puts in front included; None when it cannot."""
        with contextlib.suppress(ExchangeError):
            reply = parse_object(await self.client.post_whole("/tokenize", _encode(self.tokenize_request(text))))
            if isinstance(reply.get("count"), int):
                return int(reply["count"])
            if isinstance(reply.get("tokens"), list):
                return len(reply["tokens"])
        return None

    def tokenize_request(self, text: str) -> Mapping[str, Any]:
        """Return the body of a request to ``/tokenize``: vLLM's, unless a target has its own."""
        return {"model": self.model, "prompt": text}


class ChatTarget(Target):
    """``POST /chat`` of edge-phi3."""

    name = "chat"
    path = "/chat"

    def request(self, ask: Ask) -> Mapping[str, Any]:
        """Return the body. The token counts come with `return_dict_in_generate`."""
        kwargs: dict[str, Any] = {"max_new_tokens": ask.max_tokens, "return_dict_in_generate": True}
        if ask.sampling.greedy:
            kwargs["do_sample"] = False
        else:
            sampling = ask.sampling
            kwargs |= {"do_sample": True, "temperature": sampling.temperature}
            kwargs |= {"top_k": sampling.top_k, "top_p": sampling.top_p} | _seed(ask)
        if ask.ignore_eos:
            kwargs["min_new_tokens"] = ask.max_tokens
        return {
            "prompt": "".join(ask.turns),
            "return_full_text": False,
            "generate_kwargs": kwargs,
            "stream": ask.stream,
        }

    def on_event(self, answer: Answer, name: str, data: bytes) -> None:
        """Read a piece of text, the result, or an error."""
        event = parse_object(data)
        if name == "":
            answer.add(event["text"])
        elif name == "result":
            self._read_usage(answer, event)
        elif name == "error":
            raise ExchangeError(str(event.get("detail")))

    def on_whole(self, answer: Answer, body: Mapping[str, Any]) -> None:
        """Read the response."""
        answer.add(body["Result"])
        self._read_usage(answer, body)

    def _read_usage(self, answer: Answer, body: Mapping[str, Any]) -> None:
        usage = body.get("usage") or {}
        answer.prompt_tokens, answer.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        answer.ended = True

    def tokenize_request(self, text: str) -> Mapping[str, Any]:
        """Return the body of a request to ``/tokenize``."""
        return {"text": text}


class LlamaServerTarget(Target):
    """``POST /completion`` of llama.cpp's server."""

    name = "llama-server"
    path = "/completion"

    def request(self, ask: Ask) -> Mapping[str, Any]:
        """Return the body. Only the samplers that are needed are in the chain; the best of one token is greedy."""
        sampling = ask.sampling
        body: dict[str, Any] = {
            "prompt": "".join(ask.turns),
            "n_predict": ask.max_tokens,
            "ignore_eos": ask.ignore_eos,
            "stream": ask.stream,
            "samplers": ["top_k"],
            "top_k": 1,
            **_seed(ask),
        }
        if not sampling.greedy:
            body |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            body["samplers"] = ["top_k", "top_p", "temperature"]
        return body

    def on_event(self, answer: Answer, name: str, data: bytes) -> None:  # noqa: ARG002 - its events have no names
        """Read a piece of text, the last event with its counts, or an error."""
        self.on_whole(answer, _event(data))

    def on_whole(self, answer: Answer, body: Mapping[str, Any]) -> None:
        """Read the response, or one event of it: they have the same fields."""
        answer.add(body.get("content", ""))
        if body.get("stop"):
            answer.prompt_tokens, answer.completion_tokens = body["tokens_evaluated"], body["tokens_predicted"]
            answer.cached_tokens = body.get("timings", {}).get("cache_n")
            answer.ended = True

    def tokenize_request(self, text: str) -> Mapping[str, Any]:
        """Return the body of a request to ``/tokenize``."""
        return {"content": text, "add_special": True, "parse_special": True}


class OpenAITarget(Target):
    """``POST /v1/completions`` of any server with OpenAI's API."""

    name = "openai"
    path = "/v1/completions"

    def request(self, ask: Ask) -> Mapping[str, Any]:
        """Return the body. What OpenAI's API lacks (`top_k`, `ignore_eos`) is sent only when it is asked for."""
        sampling = ask.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.max_tokens,
            "temperature": sampling.temperature,
            **_seed(ask),
            **self.prompt(ask),
        }
        if not sampling.greedy:
            body["top_p"] = sampling.top_p
            if sampling.top_k:
                body["top_k"] = sampling.top_k
        if ask.ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": ask.max_tokens}
        if ask.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def prompt(self, ask: Ask) -> Mapping[str, Any]:
        """Return the part of the body that holds the prompt."""
        return {"prompt": "".join(ask.turns)}

    def text_of(self, choice: Mapping[str, Any]) -> str:
        """Return the new text of a choice."""
        return str(choice.get("text") or "")

    def on_event(self, answer: Answer, name: str, data: bytes) -> None:  # noqa: ARG002 - its events have no names
        """Read a chunk, or the end."""
        if data == b"[DONE]":
            answer.ended = True
            return
        self.on_whole(answer, _event(data))

    def on_whole(self, answer: Answer, body: Mapping[str, Any]) -> None:
        """Read a response or a chunk of it."""
        for choice in body.get("choices", ()):
            answer.add(self.text_of(choice))
        if usage := body.get("usage"):
            answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


class OpenAIChatTarget(OpenAITarget):
    """``POST /v1/chat/completions`` of any server with OpenAI's API."""

    name = "openai-chat"
    path = "/v1/chat/completions"

    def prompt(self, ask: Ask) -> Mapping[str, Any]:
        """Return the conversation."""
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(ask.turns)]}

    def text_of(self, choice: Mapping[str, Any]) -> str:
        """Return the new text of a choice."""
        return str((choice.get("delta") or choice.get("message") or {}).get("content") or "")


def _event(data: bytes) -> dict[str, Any]:
    """Parse an event of a stream; an error that the server reports in it is raised."""
    event = parse_object(data)
    if error := event.get("error"):
        raise ExchangeError(str(error.get("message", error) if isinstance(error, dict) else error))
    return event


def _seed(ask: Ask) -> dict[str, int]:
    return {} if ask.seed is None else {"seed": ask.seed}


TARGETS: Final[Mapping[str, type[Target]]] = {
    target.name: target for target in (ChatTarget, LlamaServerTarget, OpenAITarget, OpenAIChatTarget)
}
"""The endpoints by the name that ``--api`` knows."""


async def open_target(client: HttpClient, api: str = "auto", model: str = "") -> Target:
    """Return the endpoint of a server, found by what the server answers when `api` is "auto".

    Args:
        client: connections to the server.
        api: a name of `TARGETS`, or "auto".
        model: the model to ask for; the first that an OpenAI-compatible server lists when empty.

    Raises:
        BenchError: nothing answers, or no endpoint is known.
    """
    if api == "auto":
        api = await _detect(client)
    target = TARGETS[api]
    if issubclass(target, OpenAITarget) and not model:
        model = await _first_model(client)
    return target(client, model)


async def _detect(client: HttpClient) -> str:
    failure = ""
    for path, name, mark in (("/version", "chat", "llama_cpp"), ("/props", "llama-server", "total_slots")):
        try:
            if mark in parse_object(await client.get(path)):
                return name
        except ExchangeError as error:
            failure = str(error)
    try:
        parse_object(await client.get("/v1/models"))
    except ExchangeError as error:
        raise BenchError(
            f"No generation endpoint is found at {client.url}: {failure or error} Say which one with --api."
        ) from None
    return "openai"


async def _first_model(client: HttpClient) -> str:
    try:
        models = parse_object(await client.get("/v1/models")).get("data") or []
    except ExchangeError as error:
        raise BenchError(f"{client.url} lists no models ({error}); name one with --model.") from None
    if not models:
        raise BenchError(f"{client.url} lists no models; name one with --model.")
    return str(models[0]["id"])
