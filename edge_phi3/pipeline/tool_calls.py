"""Tools in a conversation, for templates that know nothing of them, and calls in an answer, read as they come.

A call is ``{"name": ..., "arguments": {...}}`` in a list, which stands between Phi-4-mini's tokens for it or behind
``functools``, as Microsoft's prompts have it. `edge_phi3.engine.grammars.calls_grammar` sees to it that what begins
like a list is one.
"""

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edge_phi3.engine.grammars import BARE_CALLS, CALL_TOKENS
from edge_phi3.pipeline.answer import overlap

Message = Mapping[str, Any]

BARE_MARKS: Final = (BARE_CALLS, "")
"""What stands around a list of calls in a vocabulary without tokens for it."""

_PROMPT: Final = """\
You can call functions. To call one or more of them, answer with nothing but
{begin}[{{"name": function name, "arguments": arguments as JSON}}, ...]{end}
The arguments follow the function's JSON schema. You are then told what they return. If no function helps, answer in \
words. The functions:
"""
_BEGINNINGS: Final = (f"{BARE_CALLS}[", f"{CALL_TOKENS[0]}[")
_BEGINNING: Final = re.compile("|".join(map(re.escape, _BEGINNINGS)))
_HEAD: Final = re.compile(r'\}?[\s,]*\{"name": ?("[^"]*"), ?"arguments": ?\s*')
_LIST_END: Final = re.compile(r"\}?\s*\]")
_STRUCTURE: Final = re.compile(r'[{}"]|\\.?', re.DOTALL)


def with_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], marks: tuple[str, str], *, field: bool
) -> list[Message]:
    """Return a conversation whose system message describes tools: in the field `tools` as JSON, or in its text."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    system = messages[0] if has_system else {"role": "system", "content": ""}
    functions = [tool["function"] for tool in tools]
    if field:
        system = {**system, "tools": json.dumps(functions, ensure_ascii=False)}
    else:
        begun = system["content"] and system["content"] + "\n\n"
        described = "\n".join(json.dumps(each, ensure_ascii=False) for each in functions)
        system = {**system, "content": begun + _PROMPT.format(begin=marks[0], end=marks[1]) + described}
    return [system, *messages[has_system:]]


def without_tool_turns(
    messages: Sequence[Message], marks: tuple[str, str], *, calls: bool, results: bool
) -> list[Message]:
    """Return a conversation in the roles and fields that a template knows; `marks` stand around a list of calls.

    A template that does not write ``tool_calls`` gets `calls` as a part of the text, and one that does not write turns
    of the role tool gets `results` as the user's.
    """
    names: dict[str, str] = {}
    turns: list[Message] = []
    for message in messages:
        turn = {**message, "content": message.get("content") or ""}
        if asked := message.get("tool_calls"):
            names |= {call["id"]: call["function"]["name"] for call in asked}
            if calls:
                turn["tool_calls"] = [_parsed(call) for call in asked]
            else:
                del turn["tool_calls"]
                turn["content"] += f"{marks[0]}[{', '.join(map(_written, asked))}]{marks[1]}"
        elif message["role"] == "tool":
            name = names.get(message.get("tool_call_id", ""), "The function")
            turn = (
                turn | {"name": name}
                if results
                else {"role": "user", "content": f"{name} returned:\n{turn['content']}"}
            )
        turns.append(turn)
    return turns


def _written(call: Mapping[str, Any]) -> str:
    function = call["function"]
    return f'{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"] or "{}"}}}'


def _parsed(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a call with its arguments as templates expect them: an object, where they are JSON."""
    try:
        arguments = json.loads(call["function"]["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of call number `index` of its answer, of the tool `name`; its result refers to `id`.

    `arguments` are the next characters of its arguments as JSON; none in the first piece.
    """

    index: int
    id: str
    name: str
    arguments: str = ""


class CallReader:
    """Takes an answer apart, as it comes, into text and calls; `count` is how many calls have begun."""

    def __init__(self) -> None:
        self.count = 0
        self._held = ""
        self._where = "text"
        self._told = False
        self._depth = 0
        self._quoted = False
        self._call: CallPart | None = None

    @property
    def whole(self) -> bool:
        """Whether there are calls, the last of which has ended."""
        return self.count > 0 and self._where != "arguments"

    def push(self, text: str, *, last: bool = False) -> Iterator[str | CallPart]:
        """Take new text, and yield what is certain of it: all where no more comes."""
        self._held += text
        if self._where == "text":
            found = _BEGINNING.search(self._held)
            kept = 0 if last else max(overlap(self._held, each) for each in _BEGINNINGS)
            end = found.start() if found else len(self._held) - kept
            shown = self._held[:end]
            if not self._told and shown.isspace() and (found or not last):
                shown, end = "", end if found else 0  # none of it is told where a call follows
            if shown:
                self._told = True
                yield shown
            self._held = self._held[found.end() if found else end :]
            self._where = "head" if found else "text"
        while self._where != "text":
            if self._where == "arguments":
                if not (piece := self._arguments()):
                    return
                assert self._call is not None
                yield CallPart(self._call.index, self._call.id, self._call.name, piece)
            elif head := _HEAD.match(self._held):
                self._held = self._held[head.end() :]
                self._call = CallPart(self.count, f"call_{uuid.uuid4().hex[:24]}", json.loads(head[1]))
                self.count += 1
                self._where = "arguments"
                yield self._call
            else:
                if _LIST_END.match(self._held):  # nothing follows but the token that closes the list
                    self._where = "end"
                return

    def _arguments(self) -> str:
        """Return what there is of a call's arguments."""
        held = self._held if self._depth else self._held.lstrip()
        end = len(held)
        for sign in _STRUCTURE.finditer(held):
            if sign[0] == '"':
                self._quoted = not self._quoted
            elif sign[0] == "\\":  # what it escapes has not come
                end = sign.start()
            elif not self._quoted and sign[0] in "{}":
                self._depth += 1 if sign[0] == "{" else -1
                if self._depth == 0:
                    end, self._where = sign.end(), "head"
                    break
        self._held = held[end:]
        return held[:end]
