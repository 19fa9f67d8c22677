"""OpenAI's Responses: a request as one for chat completions, and its answer as items, whole or in events."""

import functools
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct

from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.exchange import event
from edge_phi3.api.openai.answers import Answer, Part, Reason, Tokens
from edge_phi3.api.openai.fields import (
    TEXT_ONLY,
    ChatCompletionMessage,
    ChatCompletionRequest,
    ResponseFormat,
    ToolFields,
)
from edge_phi3.api.openai.schemas import CompletionUsage, FunctionCall, PromptTokensDetails, ToolCall
from edge_phi3.api.openai.shown import chat_logprobs
from edge_phi3.api.openai.tools import FunctionDefinition, Tool
from edge_phi3.api.schemas import about

_LOGPROBS: Final = "message.output_text.logprobs"
_TEXTS: Final = frozenset({"input_text", "output_text", "text"})
_NAMES: Final = (
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format.schema", "text.format.schema"),
    ("response_format", "text.format"),
    (".function.", "."),
    ("`max_completion_tokens`", "`max_output_tokens`"),
)
"""Fields of chat completions in sentences, and what they are called here."""


class FunctionTool(FunctionDefinition, kw_only=True, omit_defaults=True):
    """A function that the model may call; there are no other tools."""

    type: str


class TextOptions(Struct, kw_only=True):
    """How the answer is written."""

    format: ResponseFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(ToolFields, kw_only=True):
    """A conversation to be continued by the assistant, as items."""

    input: Annotated[
        str | list[dict[str, Any]],
        about("A text, or items: messages, `function_call` and `function_call_output`; `reasoning` is passed over."),
    ]
    instructions: Annotated[str | None, about("What a system message says.")] = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128, description="As in chat completions, flat.")] | None = (
        None
    )
    text: Annotated[TextOptions | None, about("`format` holds the answer to JSON, or to a JSON schema.")] = None
    max_output_tokens: Annotated[int, about("Tokens at most.", ge=1)] | None = None
    top_logprobs: Annotated[int, about("As in chat completions.", ge=0, le=20)] | None = None
    include: Annotated[list[str] | None, about(f"`{_LOGPROBS}`; the rest is ignored.")] = None
    metadata: Annotated[dict[str, Any] | None, about("Returned as it is.")] = None


class ResponseUsage(Struct):
    """How many tokens a response took."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens_details: dict[str, int]


class ResponseObject(Struct, kw_only=True):
    """A response, with what was asked for."""

    id: str
    created_at: int
    model: str
    status: Literal["completed", "incomplete", "in_progress"]
    output: Annotated[list[dict[str, Any]], about("Items: a message, calls of functions, or both.")]
    tools: list[FunctionTool]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: TextOptions
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    metadata: dict[str, Any]
    usage: ResponseUsage | None = None
    incomplete_details: dict[str, str] | None = None
    object: Literal["response"] = "response"
    error: None = None
    previous_response_id: None = None
    store: bool = False
    truncation: str = "disabled"


def renamed(error: InvalidRequestError) -> InvalidRequestError:
    """Return an error about chat completions in the words of responses."""
    sentence = str(error)
    for name, here in _NAMES:
        sentence = sentence.replace(name, here)
    return InvalidRequestError(sentence)


def as_chat(request: ResponsesRequest) -> tuple[ChatCompletionRequest, Callable[..., Answer]]:
    """Return a request for chat completions that asks for the same, and the class of its answers."""
    if request.n not in {None, 1}:
        raise InvalidRequestError("`n` is not supported: a response is one answer.")
    fields = {name: getattr(request, name) for name in ToolFields.__struct_fields__}
    if request.max_output_tokens is not None:
        fields["max_completion_tokens"] = request.max_output_tokens
    if request.text is not None:
        fields["response_format"] = request.text.format
    if request.tools is not None:
        fields["tools"] = [
            Tool(type=tool.type, function=msgspec.convert(msgspec.to_builtins(tool), FunctionDefinition))
            for tool in request.tools
        ]
    logprobs = bool(request.top_logprobs) or _LOGPROBS in (request.include or ())
    asked = ChatCompletionRequest(
        messages=_messages(request), logprobs=logprobs, top_logprobs=request.top_logprobs or 0, **fields
    )
    return asked, functools.partial(_ResponsesAnswer, request)


def _messages(request: ResponsesRequest) -> list[ChatCompletionMessage]:
    messages: list[ChatCompletionMessage] = []
    if request.instructions:
        messages.append(ChatCompletionMessage(role="system", content=request.instructions))
    asked = request.input
    items = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    for index, item in enumerate(items):
        where, kind = f"input[{index}]", item.get("type", "message")
        if kind == "message":
            content = _text(f"{where}.content", item.get("content"))
            messages.append(ChatCompletionMessage(role=_word(where, item, "role"), content=content))
        elif kind == "function_call":
            function = FunctionCall(_word(where, item, "name"), _word(where, item, "arguments"))
            call = ToolCall(id=_word(where, item, "call_id"), function=function)
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatCompletionMessage(role="assistant"))
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
        elif kind == "function_call_output":
            content = _text(f"{where}.output", item.get("output"))
            call_id = _word(where, item, "call_id")
            messages.append(ChatCompletionMessage(role="tool", content=content, tool_call_id=call_id))
        elif kind != "reasoning":
            raise InvalidRequestError(
                f"`{where}.type` must be message, function_call or function_call_output, not {str(kind)[:40]!r}."
            )
    if not items:
        raise InvalidRequestError("`input` must be a text, or a list of at least one item.")
    return messages


def _word(where: str, item: dict[str, Any], name: str) -> str:
    if not isinstance(value := item.get(name), str):
        raise InvalidRequestError(f"`{where}.{name}` must be a text.")
    return value


def _text(where: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"`{where}` must be a text or a list of parts.")
    found = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"`{where}[{index}]` has the type {str(kind)[:40]!r}, which is not supported: {TEXT_ONLY}."
            )
        found.append(part["text"])
    return "".join(found)


class _ResponsesAnswer(Answer):
    """The shapes of responses: items that grow, and an event for each change of theirs."""

    ID_PREFIX = "resp"

    def __init__(self, asked: ResponsesRequest, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._asked = asked
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._growing: object = None
        """Which part of the answer the last item is; None once it has ended."""

    def choice(self, index: int, parts: list[Part], reason: Reason, tokens: Tokens) -> Reason:
        for part in parts:
            self.told(index, part, tokens)
            tokens = None
        self._end(reason)
        return reason

    def body(self, choices: list[Reason], usage: CompletionUsage) -> ResponseObject:
        return self._response(choices[0], usage)

    def opening(self, index: int) -> bytes:  # noqa: ARG002 - there is one
        began = msgspec.to_builtins(self._response(None, None))
        return b"".join(self._event_of(f"response.{kind}", response=began) for kind in ("created", "in_progress"))

    def told(self, index: int, part: Part, tokens: Tokens) -> bytes:  # noqa: ARG002 - there is one
        said = b""
        which = "text" if isinstance(part, str) else part.index
        if self._growing != which:
            said, self._growing = self._end() + self._begin(part), which
        item = self._items[-1]
        if isinstance(part, str):
            content = item["content"][0]
            content["text"] += part
            logprobs = msgspec.to_builtins(chat_logprobs(self.pipeline, tokens or ()).content)
            content["logprobs"] += logprobs
            return said + self._of_item("output_text.delta", content_index=0, delta=part, logprobs=logprobs)
        item["arguments"] += part.arguments
        return said + (self._of_item("function_call_arguments.delta", delta=part.arguments) if part.arguments else b"")

    def ended(self, index: int, reason: Reason, usage: CompletionUsage, tokens: Tokens) -> bytes:  # noqa: ARG002 - calls have none
        said = self._end(reason)
        response = self._response(reason, usage)
        return said + self._event_of(f"response.{response.status}", response=response)

    def closing(self) -> bytes:
        return b""

    def _begin(self, part: Part) -> bytes:
        name = uuid.uuid4().hex
        item: dict[str, Any] = {"type": "message", "id": f"msg_{name}", "role": "assistant", "content": []}
        if not isinstance(part, str):
            item = {"type": "function_call", "id": f"fc_{name}", "call_id": part.id, "name": part.name, "arguments": ""}
        self._items.append(item | {"status": "in_progress"})
        said = self._item_event("added")
        if isinstance(part, str):
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._items[-1]["content"] = [content]
            said += self._of_item("content_part.added", content_index=0, part=content)
        return said

    def _end(self, reason: Reason | None = None) -> bytes:
        """End the last item; where the answer ends with a reason, it has one."""
        said = b"" if self._items or reason is None else self.told(0, "", None)
        if self._growing is None:
            return said
        self._growing = None
        item = self._items[-1]
        item["status"] = "incomplete" if reason == "length" else "completed"
        if item["type"] == "message":
            content = item["content"][0]
            said += self._of_item(
                "output_text.done", content_index=0, text=content["text"], logprobs=content["logprobs"]
            )
            said += self._of_item("content_part.done", content_index=0, part=content)
        else:
            said += self._of_item("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        return said + self._item_event("done")

    def _item_event(self, kind: str) -> bytes:
        return self._event_of(f"response.output_item.{kind}", output_index=len(self._items) - 1, item=self._items[-1])

    def _of_item(self, kind: str, **content: object) -> bytes:
        item_id, output_index = self._items[-1]["id"], len(self._items) - 1
        return self._event_of(f"response.{kind}", item_id=item_id, output_index=output_index, **content)

    def _event_of(self, kind: str, **content: object) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **content}, kind)

    def _response(self, reason: Reason | None, usage: CompletionUsage | None) -> ResponseObject:
        asked, counted = self._asked, None
        if usage is not None:
            tokens = usage.prompt_tokens, usage.completion_tokens, usage.total_tokens
            details = usage.prompt_tokens_details
            cached = PromptTokensDetails(0) if details is UNSET else details
            counted = ResponseUsage(*tokens, cached, {"reasoning_tokens": 0})
        name, created, model = self.head
        return ResponseObject(
            id=name,
            created_at=created,
            model=model,
            status="in_progress" if reason is None else "incomplete" if reason == "length" else "completed",
            incomplete_details={"reason": "max_output_tokens"} if reason == "length" else None,
            output=self._items,
            usage=counted,
            tools=asked.tools or [],
            tool_choice=asked.tool_choice or "auto",
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            text=TextOptions(format=(asked.text and asked.text.format) or ResponseFormat(type="text")),
            metadata=asked.metadata or {},
            **{name: getattr(asked, name) for name in ("instructions", "max_output_tokens", "temperature", "top_p")},
        )
