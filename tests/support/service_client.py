"""One request over HTTP, what came of it, whether that is right, and whether two answers are the same."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from openai._streaming import ServerSentEvent, SSEDecoder

CHAT, CHAT_COMPLETIONS, COMPLETIONS = "/chat", "/v1/chat/completions", "/v1/completions"
Must = Literal["answer", "refusal", ""]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and what is to be expected of its answer.

    Attributes:
        kind: what it is counted as.
        repeats: whether the same request alone must be answered alike.
        always: whether that is to be tried whatever chance says.
        must: "answer" when it fits in any case, "refusal" when it is wrong, "" when either is right.
        names: what the sentence of a refusal must hold.
        leaves: seconds after which the client closes its connection; None to stay.
        follows: whether it goes on from the answer to the request before it in its chain.
        pipelined: how many other requests are sent on its connection before it, and after it, without waiting.
    """

    kind: str
    path: str
    body: dict[str, Any] | bytes
    repeats: bool = False
    always: bool = False
    must: Must = ""
    names: str = ""
    leaves: float | None = None
    follows: bool = False
    pipelined: int = 0

    @property
    def kwargs(self) -> dict[str, Any]:
        return (self.body.get("generate_kwargs") or {}) if isinstance(self.body, dict) else {}

    @property
    def has_seed(self) -> bool:
        return isinstance(self.body, dict) and self.body.get("seed", self.kwargs.get("seed")) is not None

    def asking(self, **kwargs: Any) -> Ask:
        assert isinstance(self.body, dict)
        return dataclasses.replace(self, body=self.body | {"generate_kwargs": self.kwargs | kwargs})

    def adapted(self, name: str) -> Ask:
        """Return the same request for an adapter; a body that is no object stays as it is."""
        if isinstance(self.body, bytes):
            return self
        chosen_by = "adapters" if self.path == CHAT else "model"
        return dataclasses.replace(self, body=self.body | {chosen_by: name})

    def after(self, before: Ask, text: str) -> Ask:
        """Return this request as one that goes on from what was asked before and the answer to it."""
        assert isinstance(self.body, dict)
        assert isinstance(before.body, dict)
        if "messages" in self.body:
            turns = [*before.body["messages"], {"role": "assistant", "content": text}, *self.body["messages"]]
            return dataclasses.replace(self, body=self.body | {"messages": turns})
        prompt = f"{before.body['prompt']}{text} {self.body['prompt']}"
        return dataclasses.replace(self, body=self.body | {"prompt": prompt})


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated, for one sequence also its new text.

    Tokens (ids or texts, and what ended them) must be equal when the request is repeated, numbers (scores and
    log-probabilities) nearly equal.
    """

    tokens: Any
    numbers: list[float | None] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request: status 0 when no whole answer came; trouble is what is wrong whatever was asked."""

    status: int
    seconds: float = 0.0
    answer: Answer | None = None
    sentence: str = ""
    retry_after: str | None = None
    trouble: str = ""

    @property
    def column(self) -> str:
        if self.status == LEFT:
            return "left"
        if self.status == 200 and self.answer is not None:
            return "answered"
        if "leave no token" in self.sentence or "leaves no token" in self.sentence:
            return "nothing to choose"  # by the request's own parameters, which may show late
        if self.status == 429:
            return "queue full"
        return "refused" if 400 <= self.status < 500 else "failed"


_ALIVE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
LEFT = -1
"""The status of a request whose client left."""


def send(port: int, ask: Ask, patience: float) -> Outcome:
    started = time.monotonic()
    body = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience)
    try:
        connection.connect()
        connection.sock.sendall(_ALIVE * ask.pipelined)
        connection.request("POST", ask.path, body, {"Content-Type": "application/json"})
        connection.sock.sendall(_ALIVE * ask.pipelined)
        if ask.leaves is not None:
            time.sleep(ask.leaves)
            return Outcome(LEFT, ask.leaves)
        for _ in range(ask.pipelined):
            _read_alive(connection.sock)
        response = connection.getresponse()
        pieces = []
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            if time.monotonic() - started > patience:
                raise TimeoutError
        outcome = _read(ask, response, b"".join(pieces))
    except TimeoutError:
        outcome = Outcome(0, trouble="no answer came")
    except (OSError, http.client.HTTPException) as error:
        outcome = Outcome(0, trouble=f"the connection broke: {error!r}")
    finally:
        connection.close()
    return dataclasses.replace(outcome, seconds=time.monotonic() - started)


def _read_alive(sock: socket.socket) -> None:
    """Read the answer to one `_ALIVE`, and not a byte of the next."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += sock.recv(1) or b"}"
    if not answer.startswith(b"HTTP/1.1 200 ") or b"Alive" not in answer:
        raise ConnectionError(f"a request for /livez is answered {answer!r}")


def _read(ask: Ask, response: http.client.HTTPResponse, content: bytes) -> Outcome:
    try:
        if response.status != 200:
            sentence = _sentence(json.loads(content))
            return Outcome(response.status, sentence=sentence, retry_after=response.getheader("Retry-After"))
        if (response.getheader("Content-Type") or "").startswith("text/event-stream"):
            return _read_stream(ask, [*SSEDecoder().iter_bytes(iter([content]))])
        return Outcome(200, answer=_answer([json.loads(content)]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Outcome(response.status, trouble=f"not to be read ({error!r}): {content[:500]!r}")


def _sentence(body: dict[str, Any]) -> str:
    return body["error"]["message"] if "error" in body else body["detail"]


def _read_stream(ask: Ask, events: list[ServerSentEvent]) -> Outcome:
    """Read a stream; its pieces together must be what its result says."""
    for each in events:
        if each.event == "error" or '"error"' in each.data[:9]:
            return Outcome(200, sentence=_sentence(each.json()))
    if not events or (events[-1].data != "[DONE]" and events[-1].event != "result"):
        return Outcome(0, trouble="the stream ended without a result or [DONE]")
    decoded: list[Any] = [each.json() if each.data != "[DONE]" else None for each in events]
    *chunks, last = decoded
    if last is None:
        return Outcome(200, answer=_answer(chunks))
    answer = _answer([last])
    pieces = "".join(chunk["text"] for chunk in sorted(chunks, key=lambda chunk: chunk["index"]))
    differ = pieces != answer.text and ask.kwargs.get("num_beams", 1) == 1
    return Outcome(200, answer=answer, trouble=f"its pieces are {pieces!r}, not {answer.text!r}" if differ else "")


def _answer(chunks: list[dict[str, Any]]) -> Answer:
    """Return the answer whose chunks these are; a plain one is a single chunk."""
    if "choices" not in chunks[0]:
        (body,) = chunks
        if "Result" not in body:
            return Answer([body.get("tokens"), body.get("token_strs"), body.get("text")])
        scored = [token for sequence in body.get("scores") or [] for token in sequence]
        numbers = [
            *(body.get("sequences_scores") or []),
            *(token[name] for token in scored for name in ("score", "logprob")),
        ]
        return Answer(body.get("sequences", body["Result"]), numbers, body["Result"])
    choices: dict[int, tuple[list[Any], list[float | None]]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        tokens, numbers = choices.setdefault(choice["index"], (["", None], []))
        part = choice.get("message") or choice.get("delta", choice)
        tokens[0] += part.get("content") or part.get("text") or ""
        for call in part.get("tool_calls") or ():
            tokens[0] += call["function"].get("name", "") + call["function"]["arguments"]
        tokens[1] = choice.get("finish_reason") or tokens[1]
        logprobs = choice.get("logprobs") or {}
        numbers += logprobs.get("token_logprobs") or [token["logprob"] for token in logprobs.get("content") or []]
    return Answer(
        [choices[index][0] for index in sorted(choices)],
        [number for index in sorted(choices) for number in choices[index][1]],
    )


def complaint_about(ask: Ask, outcome: Outcome, *, deadline: float, refusal: float) -> str:
    """Return what is wrong with an outcome, "" if nothing is; answers and refusals have their times, in seconds."""
    column, sentence = outcome.column, outcome.sentence
    refused = column == "refused"
    complaints = [
        (bool(outcome.trouble), outcome.trouble),
        (outcome.seconds > deadline, "answered after its deadline"),
        (column == "failed", "failed"),
        (column == "queue full" and not outcome.retry_after, "429 without Retry-After"),
        (column == "answered" and ask.must == "refusal", "it is wrong and was answered"),
        (refused and ask.must == "answer", "it fits and was refused"),
        (refused and outcome.seconds > refusal, "refused late"),
        (refused and (len(sentence) < 10 or ask.names not in sentence), f"its refusal does not name {ask.names!r}"),
    ]
    shown = f"{outcome.status} {sentence!r}, {outcome.seconds:.1f} s"
    return next((f"{what}: {shown}" for wrong, what in complaints if wrong), "")


def difference(one: Outcome, other: Outcome, tolerance: float) -> str:
    """Return how two outcomes of one request differ, "" if not; numbers by more than a share of themselves or of 1."""
    if one.answer is None or other.answer is None:
        same = one.status == other.status and (one.answer is None) == (other.answer is None)
        return "" if same else f"{one.status} {one.sentence!r}, but {other.status} {other.sentence!r}"
    if one.answer.tokens != other.answer.tokens:
        return f"{one.answer.tokens!r}, but {other.answer.tokens!r}"
    ours, theirs = (np.array(each.answer.numbers, np.float64) for each in (one, other) if each.answer)  # None is NaN
    near = ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    return "" if near else f"equal tokens, but the numbers {ours.tolist()} and {theirs.tolist()}"
