"""The generation endpoints that the load generator knows: how to write requests to each and read its answers."""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import httpx
import msgspec

from edge_phi3.bench import BenchError, ExchangeError
from edge_phi3.bench.workload import WORDS, Ask, Ruler, Workload

_FEWEST_WORDS = 32


class HttpClient:
    """Connections to one server, as many as there are exchanges at once, each of which may take `timeout` seconds.

    The path of `url` is put in front of every other; `api_key` is sent as a bearer token.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        try:
            address = httpx.URL(url if "//" in url else f"http://{url}")
        except httpx.InvalidURL as error:
            raise BenchError(f"{url!r} is not an address: {error}.") from None
        if address.scheme not in {"http", "https"} or not address.host:
            raise BenchError(f"{url!r} is not the address of an HTTP server; give one like http://127.0.0.1:8080.")
        self.url = str(address).rstrip("/")
        self._timeout = timeout
        self._client = httpx.AsyncClient(
            base_url=address,
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=2 * timeout,  # what ends an exchange is the limit in `exchange`
            limits=httpx.Limits(keepalive_expiry=2.0),  # servers close idle connections later
            # The system's certificates, and nothing else of the environment: a proxy would be measured as well.
            verify=ssl.create_default_context() if address.scheme == "https" else False,
            trust_env=False,
            transport=transport,
        )
        self.close = self._client.aclose

    async def exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, take: Callable[[bytes], Any]
    ) -> None:
        """Send a request, with JSON or without, and hand each piece of the response's body to `take` as it comes.

        `ExchangeError` is no connection, a broken one, no end within the time limit, or a status other than 200.
        """
        content = None if body is None else msgspec.json.encode(body)
        headers = None if body is None else {"Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._client.stream(method, path, content=content, headers=headers) as response,
            ):
                if response.status_code != 200:
                    detail = (await response.aread()).decode(errors="replace")[:300].strip()
                    raise ExchangeError(f"HTTP {response.status_code}" + (f": {detail}" if detail else ""))
                async for piece in response.aiter_bytes():
                    take(piece)
        except TimeoutError:
            raise ExchangeError(f"No end of the response within {self._timeout:g} s.") from None
        except httpx.ConnectError as error:
            raise ExchangeError(f"No connection to {self.url}: {error}.") from None
        except httpx.HTTPError as error:
            raise ExchangeError(f"The connection broke: {str(error) or type(error).__name__}") from None

    async def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object that the server answers; raises as `exchange` and `_parse_object` do."""
        whole = bytearray()
        await self.exchange(method, path, body, whole.extend)
        return _parse_object(bytes(whole))


def _parse_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; `ExchangeError` when it is something else, or the error that a server reports."""
    try:
        value = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ExchangeError(f"The server sent what is not JSON: {data[:80]!r} ({error}).") from None
    if not isinstance(value, dict):
        raise ExchangeError(f"The server sent {data[:80]!r} where an object belongs.")
    if reported := value.get("error") or value.get("detail"):
        raise ExchangeError(str(reported.get("message", reported) if isinstance(reported, dict) else reported))
    return value


@dataclass(slots=True)
class Answer:
    """One generated answer, in pieces, each with its time (`time.perf_counter`); counts that no server gives are None.

    `cached_tokens` are those of the prompt that were not computed anew; `ended` is whether the server said it is whole.
    """

    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    ended: bool = False

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)

    def add(self, text: str) -> None:
        """Note a piece of text that came just now; an empty one does not count."""
        if text:
            self.texts.append(text)
            self.times.append(time.perf_counter())


def _chat_body(ask: Ask, _model: str) -> dict[str, Any]:
    """Return what edge-phi3's ``/chat`` takes. The token counts come with `return_dict_in_generate`."""
    how = ask.how
    kwargs: dict[str, Any] = {"max_new_tokens": ask.max_tokens, "return_dict_in_generate": True, "do_sample": False}
    if how.temperature:
        kwargs |= {"do_sample": True, "temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
    if how.ignore_eos:
        kwargs["min_new_tokens"] = ask.max_tokens
    prompt = "".join(ask.turns)
    return {"prompt": prompt, "return_full_text": False, "generate_kwargs": kwargs, "stream": how.stream}


def _read_chat(answer: Answer, body: Mapping[str, Any]) -> None:
    """Read a piece of text, or the whole answer, which also ends a stream."""
    if "text" in body:
        answer.add(body["text"])
        return
    if not answer.texts:
        answer.add(body["Result"])
    usage = body.get("usage") or {}
    answer.prompt_tokens, answer.completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    answer.ended = True


def _completion_body(ask: Ask, _model: str) -> dict[str, Any]:
    """Return what llama-server takes: only the samplers that are needed, and the best of one token for greedy."""
    how = ask.how
    body: dict[str, Any] = {
        "prompt": "".join(ask.turns),
        "n_predict": ask.max_tokens,
        "ignore_eos": how.ignore_eos,
        "stream": how.stream,
        "samplers": ["top_k"],
        "top_k": 1,
    }
    if how.temperature:
        body |= {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
        body["samplers"] = ["top_k", "top_p", "temperature"]
    return body


def _read_completion(answer: Answer, body: Mapping[str, Any]) -> None:
    answer.add(body.get("content", ""))
    if body.get("stop"):
        answer.prompt_tokens, answer.completion_tokens = body["tokens_evaluated"], body["tokens_predicted"]
        answer.cached_tokens = body.get("timings", {}).get("cache_n")
        answer.ended = True


def _openai_body(ask: Ask, model: str) -> dict[str, Any]:
    """Return what OpenAI's API takes. What it lacks (`top_k`, `ignore_eos`) is sent only when it is set."""
    how = ask.how
    body: dict[str, Any] = {"model": model, "prompt": "".join(ask.turns), "max_tokens": ask.max_tokens}
    body["temperature"] = how.temperature
    if how.temperature:
        body |= {"top_p": how.top_p} | ({"top_k": how.top_k} if how.top_k else {})
    if how.ignore_eos:
        body |= {"ignore_eos": True, "min_tokens": ask.max_tokens}
    if how.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _openai_chat_body(ask: Ask, model: str) -> dict[str, Any]:
    body = _openai_body(ask, model)
    del body["prompt"]
    roles = ("user", "assistant")
    return body | {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(ask.turns)]}


def _read_openai(answer: Answer, body: Mapping[str, Any]) -> None:
    for choice in body.get("choices", ()):
        message = choice.get("delta") or choice.get("message") or {}
        answer.add(choice.get("text") or message.get("content") or "")
    if usage := body.get("usage"):
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


class Api(NamedTuple):
    """A kind of endpoint.

    `body` makes a request from a prompt's settings and the model's name, `tokenize` one to ``/tokenize`` of a text and
    the name; `read` adds to the answer so far what came: an event of a stream, or all.
    """

    path: str
    body: Callable[[Ask, str], dict[str, Any]]
    read: Callable[[Answer, Mapping[str, Any]], None]
    tokenize: Callable[[str, str], dict[str, Any]] = lambda text, model: {"model": model, "prompt": text}


APIS: Final[Mapping[str, Api]] = {
    "chat": Api("/chat", _chat_body, _read_chat, lambda text, _: {"text": text}),
    "llama-server": Api(
        "/completion",
        _completion_body,
        _read_completion,
        lambda text, _: {"content": text, "add_special": True, "parse_special": True},
    ),
    "openai": Api("/v1/completions", _openai_body, _read_openai),
    "openai-chat": Api("/v1/chat/completions", _openai_chat_body, _read_openai),
}
"""The endpoints by the name that ``--api`` knows."""


class Endpoint:
    """A generation endpoint of a server, one of `APIS`; `model` is named in requests, where the endpoint wants one."""

    def __init__(self, client: HttpClient, name: str, model: str = "") -> None:
        self.client, self.name, self.model = client, name, model
        self.api = APIS[name]

    async def generate(self, ask: Ask, answer: Answer) -> None:
        """Send a request and fill `answer` as pieces come in; an early end of the stream is an `ExchangeError` too."""
        body = self.api.body(ask, self.model)
        if not ask.how.stream:
            self.api.read(answer, await self.client.send("POST", self.api.path, body))
            return
        rest = b""

        def take(piece: bytes) -> None:
            nonlocal rest
            *lines, rest = (rest + piece).split(b"\n")
            # Generation servers send the data of an event in one line.
            for data in (line[5:].strip() for line in lines if line.startswith(b"data:")):
                answer.ended |= data == b"[DONE]"
                if data != b"[DONE]":
                    self.api.read(answer, _parse_object(data))

        await self.client.exchange("POST", self.api.path, body, take)
        if not answer.ended:
            raise ExchangeError("The stream ended before the answer did.")

    async def count_tokens(self, text: str) -> int | None:
        """Return a text's tokens as the server counts them, special ones in front included; None when it does not."""
        try:
            reply = await self.client.send("POST", "/tokenize", self.api.tokenize(text, self.model))
        except ExchangeError:
            return None
        tokens = reply.get("tokens")
        return reply["count"] if "count" in reply else len(tokens) if isinstance(tokens, list) else None


async def open_endpoint(client: HttpClient, api: str = "auto", model: str = "") -> Endpoint:
    """Return the endpoint of a server, found by what the server answers when `api` is "auto".

    An empty `model` is the first that an OpenAI-compatible server lists.
    """
    failures: list[str] = []

    async def get(path: str) -> dict[str, Any]:
        try:
            return await client.send("GET", path)
        except ExchangeError as error:
            failures.append(str(error))
            return {}

    if api == "auto":
        if "llama_cpp" in await get("/version"):
            api = "chat"
        elif "total_slots" in await get("/props"):
            api = "llama-server"
        elif await get("/v1/models"):
            api = "openai"
        else:
            reason = " ".join(failures[-1:])
            raise BenchError(f"No generation endpoint is found at {client.url}: {reason} Say which one with --api.")
    if api.startswith("openai") and not model:
        failures.clear()
        models = (await get("/v1/models")).get("data")
        if not models:
            reason = f" ({failures[-1]})" if failures else ""
            raise BenchError(f"{client.url} lists no models{reason}; name one with --model.")
        model = str(models[0]["id"])
    return Endpoint(client, api, model)


async def measure_ruler(endpoint: Endpoint) -> Ruler:
    """Return how a server counts tokens.

    With a ``/tokenize`` endpoint only words of one token each are used, and lengths are exact. Otherwise one request
    over all words gives their mean length; a server that does not report it is taken to have one token a word.
    """
    overhead = await endpoint.count_tokens("")
    if overhead is not None:
        words = await _single_token_words(endpoint, WORDS, overhead)
        if len(words) >= _FEWEST_WORDS:
            return Ruler(words, 1.0, overhead, exact=True)
    answer = Answer()
    try:
        await endpoint.generate(Ask([" ".join(WORDS)], 1, Workload()), answer)
    except ExchangeError as error:
        raise BenchError(f"{endpoint.client.url}{endpoint.api.path} does not generate: {error}") from None
    return Ruler(WORDS, (answer.prompt_tokens or len(WORDS)) / len(WORDS), 0, exact=False)


async def _single_token_words(endpoint: Endpoint, words: Sequence[str], overhead: int) -> list[str]:
    """Find the words of one token each by halving: texts of such words have as many tokens as words."""
    if await endpoint.count_tokens(" ".join(words)) == overhead + len(words):
        return list(words)
    if len(words) == 1:
        return []
    half = len(words) // 2
    return [
        *await _single_token_words(endpoint, words[:half], overhead),
        *await _single_token_words(endpoint, words[half:], overhead),
    ]
