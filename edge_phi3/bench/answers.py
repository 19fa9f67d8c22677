"""What comes back from a generation endpoint: server-sent events, read as they arrive, with the time of each piece."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from edge_phi3.bench.errors import ExchangeError

EventHandler = Callable[["Answer", str, bytes], None]
"""Takes the answer being read, the event's name ("" for none) and its data."""

_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Answer:
    """One generated answer.

    Attributes:
        texts: its pieces, in order.
        times: when each piece came, in seconds of `time.perf_counter`.
        prompt_tokens: tokens of the prompt as the server counts them, or None when it does not say.
        completion_tokens: tokens generated as the server counts them, or None.
        cached_tokens: tokens of the prompt that the server did not compute anew, or None.
        ended: whether the server said that the answer is complete.
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


class EventReader:
    """Reads server-sent events from pieces of a body.

    Follows https://html.spec.whatwg.org/multipage/server-sent-events.html as far as generation servers use it: `event`
    and `data` lines, comments, and line ends of either kind.

    Args:
        answer: what the handler fills.
        handle: called for each event.
    """

    def __init__(self, answer: Answer, handle: EventHandler) -> None:
        self._answer = answer
        self._handle = handle
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take the next piece of the body."""
        data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")  # one that is cut in two is seen whole with the next piece
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            self._read(event)

    def _read(self, event: bytes) -> None:
        name, lines = "", []
        for line in event.split(b"\n"):
            if line.startswith(b"data:"):
                lines.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"event:"):
                name = line[6:].strip().decode()
        if lines:
            self._handle(self._answer, name, b"\n".join(lines))


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ExchangeError: the data is something else.
    """
    try:
        value = _decode(data)
    except msgspec.DecodeError as error:
        raise ExchangeError(f"The server sent what is not JSON: {data[:80]!r} ({error}).") from None
    if not isinstance(value, dict):
        raise ExchangeError(f"The server sent {data[:80]!r} where an object belongs.")
    return value
