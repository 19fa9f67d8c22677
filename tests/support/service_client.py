"""One request over HTTP, what came of it, whether that is right, and whether two answers are the same."""

from __future__ import annotations

import dataclasses
import http.client
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

CHAT, CHAT_COMPLETIONS, COMPLETIONS = "/chat", "/v1/chat/completions", "/v1/completions"
_NOTHING_TO_CHOOSE = ("leave no token", "leaves no token")
"""What a request fails with whose own parameters left nothing to choose: that may come late."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, and what is to be expected of its answer.

    Attributes:
        kind: what it is counted as.
        path: the route.
        body: its JSON, or bytes as they are.
        repeats: whether the same request alone must be answered alike.
        always: whether that is to be tried whatever chance says.
        must: "answer" when it fits in any case, "refusal" when it is wrong, "" when either is right.
        names: what the sentence of a refusal must hold.
        leaves: seconds after which the client closes its connection; None to stay.
        follows: whether it goes on from the answer to the request before it in its chain.
        media_type: what the body is said to be.
    """

    kind: str
    path: str
    body: dict[str, Any] | bytes
    repeats: bool = False
    always: bool = False
    must: Literal["answer", "refusal", ""] = ""
    names: str = ""
    leaves: float | None = None
    follows: bool = False
    media_type: str = "application/json"

    @property
    def kwargs(self) -> dict[str, Any]:
        """The generation parameters as they are written in the body; empty where there are none."""
        return (self.body.get("generate_kwargs") or {}) if isinstance(self.body, dict) else {}

    @property
    def has_seed(self) -> bool:
        """Whether the request asks to be repeatable."""
        return isinstance(self.body, dict) and (self.body.get("seed", self.kwargs.get("seed")) is not None)

    def after(self, before: Ask, text: str) -> Ask:
        """Return this request as one that goes on from what was asked before and the answer to it."""
        if not (isinstance(self.body, dict) and isinstance(before.body, dict)):
            return self
        if "messages" in self.body:
            turns = [*before.body["messages"], {"role": "assistant", "content": text}, *self.body["messages"]]
            return dataclasses.replace(self, body=self.body | {"messages": turns})
        return dataclasses.replace(
            self, body=self.body | {"prompt": f"{before.body['prompt']}{text} {self.body['prompt']}"}
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated.

    Attributes:
        tokens: what must be equal when the request is repeated: token ids or texts, and what ended them.
        numbers: scores and log-probabilities, which must be nearly equal.
        text: the new text of a request for one sequence.
    """

    tokens: Any
    numbers: list[float | None] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request.

    Attributes:
        status: the status code; 0 when no whole answer came.
        seconds: until then.
        answer: what was generated.
        sentence: of an error.
        retry_after: the header.
        trouble: what is wrong with the answer itself, whatever was asked.
    """

    status: int
    seconds: float
    answer: Answer | None = None
    sentence: str = ""
    retry_after: str | None = None
    trouble: str = ""

    @property
    def has_decided(self) -> bool:
        """Whether the service answered the request or refused it for good."""
        return self.status not in {0, 429} and self.status < 500

    @property
    def failed_by_itself(self) -> bool:
        """Whether the request's own parameters left no token to choose."""
        return any(words in self.sentence for words in _NOTHING_TO_CHOOSE)


LEFT = -1
"""The status of a request whose client left."""


def send(port: int, ask: Ask, patience: float) -> Outcome:
    """Send a request, and wait for its answer for so many seconds at most."""
    started = time.monotonic()
    body = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience)
    try:
        connection.request("POST", ask.path, body, {"Content-Type": ask.media_type})
        if ask.leaves is not None:
            time.sleep(ask.leaves)
            return Outcome(LEFT, ask.leaves)
        response = connection.getresponse()
        pieces = []
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            if time.monotonic() - started > patience:
                raise TimeoutError
        return _read(ask, response, b"".join(pieces), time.monotonic() - started)
    except TimeoutError:
        return Outcome(0, time.monotonic() - started, trouble="no answer came")
    except (OSError, http.client.HTTPException) as error:
        return Outcome(0, time.monotonic() - started, trouble=f"the connection broke: {error!r}")
    finally:
        connection.close()


def _read(ask: Ask, response: http.client.HTTPResponse, content: bytes, seconds: float) -> Outcome:
    retry_after = response.getheader("Retry-After")
    try:
        if response.status != 200:
            sentence = _sentence(json.loads(content))
            return Outcome(response.status, seconds, sentence=sentence, retry_after=retry_after)
        if (response.getheader("Content-Type") or "").startswith("text/event-stream"):
            return _read_stream(ask, content, seconds)
        return Outcome(200, seconds, _answer(ask, json.loads(content)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Outcome(
            response.status, seconds, retry_after=retry_after, trouble=f"not to be read ({error!r}): {content[:500]!r}"
        )


def _sentence(body: dict[str, Any]) -> str:
    sentence: str = body["error"]["message"] if "error" in body else body["detail"]
    return sentence


def _events(content: bytes) -> Iterator[tuple[str, str]]:
    for block in content.decode().split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if not line.startswith(":")]
        fields = {name: value for name, _, value in lines}
        if "data" in fields:
            yield fields.get("event", ""), fields["data"]


def _read_stream(ask: Ask, content: bytes, seconds: float) -> Outcome:
    """Read a stream; its pieces together must be what its result says."""
    events = list(_events(content))
    for name, data in events:
        if name == "error" or '"error"' in data[:9]:
            return Outcome(200, seconds, sentence=_sentence(json.loads(data)))
    if ask.path == CHAT:
        if not events or events[-1][0] != "result":
            return Outcome(0, seconds, trouble="the stream ended without a result")
        result = json.loads(events[-1][1])
        texts: dict[int, str] = {}
        for _, data in events[:-1]:
            delta = json.loads(data)
            texts[delta["index"]] = texts.get(delta["index"], "") + delta["text"]
        pieces = "".join(texts[index] for index in sorted(texts))
        beams = ask.kwargs.get("num_beams", 1) > 1
        differ = not beams and pieces != result["Result"]
        trouble = f"its pieces are {pieces!r}, but its result is {result['Result']!r}" if differ else ""
        return Outcome(200, seconds, _answer(ask, result), trouble=trouble)
    if not events or events[-1][1] != "[DONE]":
        return Outcome(0, seconds, trouble="the stream ended without [DONE]")
    return Outcome(200, seconds, _joined([json.loads(data) for _, data in events[:-1]]))


def _joined(chunks: list[dict[str, Any]]) -> Answer:
    """Return the answer whose chunks these are."""
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    numbers: dict[int, list[float | None]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        index = choice["index"]
        piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
        texts[index] = texts.get(index, "") + (piece or "")
        ends[index] = choice.get("finish_reason") or ends.get(index)
        numbers.setdefault(index, []).extend(_numbers(choice.get("logprobs")))
    order = sorted(texts)
    return Answer([[texts[i], ends[i]] for i in order], [number for i in order for number in numbers[i]])


def _answer(ask: Ask, body: dict[str, Any]) -> Answer:
    if ask.path != CHAT:
        tokens = [
            [choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"]]
            for choice in body["choices"]
        ]
        return Answer(tokens, [number for choice in body["choices"] for number in _numbers(choice.get("logprobs"))])
    numbers = [*(body.get("sequences_scores") or [])]
    for token in (token for sequence in body.get("scores") or [] for token in sequence):
        numbers += [token["score"], token["logprob"]]
    return Answer(body.get("sequences", body["Result"]), numbers, body["Result"])


def _numbers(logprobs: dict[str, Any] | None) -> list[float | None]:
    if logprobs is None:
        return []
    return logprobs["token_logprobs"] if "tokens" in logprobs else [token["logprob"] for token in logprobs["content"]]


# -- judging


def column_of(outcome: Outcome) -> str:
    """Return what an outcome is counted as."""
    if outcome.status == LEFT:
        return "left"
    if outcome.status == 200 and outcome.answer is not None:
        return "answered"
    if outcome.failed_by_itself:
        return "nothing to choose"
    if outcome.status == 429:
        return "queue full"
    return "refused" if 400 <= outcome.status < 500 else "failed"


def complaint_about(ask: Ask, outcome: Outcome, *, deadline: float, refusal: float) -> str:
    """Return what is wrong with an outcome; "" when nothing is.

    Args:
        ask: what was asked.
        outcome: what came of it.
        deadline: seconds in which an answer must be there.
        refusal: seconds in which a refusal must be there, whatever the load.
    """
    status, column = outcome.status, column_of(outcome)
    if outcome.trouble:
        return f"{outcome.trouble} (status {status}, {outcome.seconds:.1f} s)"
    if outcome.seconds > deadline:
        return f"answered {outcome.seconds:.1f} s after it was sent: {status} {outcome.sentence}"
    if column == "answered":
        return "it is wrong and was answered" if ask.must == "refusal" else ""
    if column in {"left", "nothing to choose"}:
        return ""
    if column == "queue full":
        return "" if outcome.retry_after else "429 without Retry-After"
    if column == "failed":
        return f"failed: {status} {outcome.sentence}"
    if ask.must == "answer":
        return f"it fits and was refused: {status} {outcome.sentence}"
    if outcome.seconds > refusal:
        return f"refused after {outcome.seconds:.1f} s: {status} {outcome.sentence}"
    if len(outcome.sentence) < 10 or ask.names not in outcome.sentence:
        return f"its refusal does not name {ask.names!r}: {status} {outcome.sentence!r}"
    return ""


def difference(one: Outcome, other: Outcome, tolerance: float) -> str:
    """Return how two outcomes of the same request differ; "" when they do not.

    Args:
        one: the first.
        other: the second.
        tolerance: by which numbers may differ, as a share of themselves, and at least of 1.
    """
    if one.answer is None or other.answer is None:
        same = one.status == other.status and (one.answer is None) == (other.answer is None)
        return "" if same else f"{one.status} {one.sentence!r}, but {other.status} {other.sentence!r}"
    if one.answer.tokens != other.answer.tokens:
        return f"{one.answer.tokens!r}, but {other.answer.tokens!r}"
    if len(one.answer.numbers) != len(other.answer.numbers):
        return f"{len(one.answer.numbers)} numbers, but {len(other.answer.numbers)}"
    for place, (a, b) in enumerate(zip(one.answer.numbers, other.answer.numbers, strict=True)):
        if not _near(a, b, tolerance):
            return f"equal tokens, but number {place} of {len(one.answer.numbers)} is {a!r}, but {b!r}"
    return ""


def _near(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None or a == b:
        return a == b
    return tolerance > 0 and math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
