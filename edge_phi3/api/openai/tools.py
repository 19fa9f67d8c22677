"""Tools in requests: what they are, and which of them the answer calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from edge_phi3.api.errors import InvalidRequestError
from edge_phi3.api.schemas import about

_CHOICES: Final = "none, auto, required, a function, or `allowed_tools`"
_NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionDefinition(Struct, kw_only=True, omit_defaults=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_.:/-]{1,64}$", description="What calls it.")]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, about("A JSON schema of its arguments; none without it.")] = None
    strict: Annotated[bool | None, about("Arguments always follow the schema.")] = None


class Tool(Struct, kw_only=True):
    """A tool; only functions are understood."""

    type: str
    function: FunctionDefinition


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What an answer does with `tools`, which are as chat templates take them.

    `allowed` are the number, name and schema of the arguments of each that may be called. The answer may do without a
    call where `may_answer`, and hold several where `parallel`.
    """

    tools: Sequence[dict[str, Any]]
    allowed: Sequence[tuple[int, str, dict[str, Any]]]
    may_answer: bool
    parallel: bool


def use_of(request: Any) -> ToolUse | None:
    """Return what an answer does with tools, or None where it calls none; a wrong one is an `InvalidRequestError`."""
    tools: list[Tool] = getattr(request, "tools", None) or []
    choice: Any = getattr(request, "tool_choice", None) or "auto"
    if not tools:
        if choice not in ("none", "auto"):
            raise InvalidRequestError("`tool_choice` needs `tools`.")
        return None
    known: dict[str, tuple[int, str, dict[str, Any]]] = {}
    for index, tool in enumerate(tools):
        name = tool.function.name
        if tool.type != "function":
            raise InvalidRequestError(f"`tools[{index}].type` must be function, not {tool.type[:40]!r}.")
        if name in known:
            raise InvalidRequestError(f"`tools[{index}].function.name` is {name!r}, as that of another.")
        known[name] = (index, name, _schema(f"tools[{index}]", tool.function))
    mode, names = _chosen(choice)
    if unknown := [name for name in names or () if name not in known]:
        raise InvalidRequestError(f"`tool_choice` names {str(unknown[0])[:64]!r}, which is not in `tools`.")
    if mode == "none":
        return None
    allowed = [known[name] for name in (known if names is None else names)]
    return ToolUse(msgspec.to_builtins(tools), allowed, mode == "auto", request.parallel_tool_calls is not False)


def _schema(where: str, function: FunctionDefinition) -> dict[str, Any]:
    if not function.parameters:
        return _NO_ARGUMENTS
    if function.parameters.get("type", "object") != "object":
        raise InvalidRequestError(f"`{where}.function.parameters` must describe an object.")
    return {"type": "object", **function.parameters}


def _chosen(choice: str | Mapping[str, Any]) -> tuple[str, list[Any] | None]:
    """Return whether tools are called (none, auto, required), and the names of those that may be; None for all."""
    if isinstance(choice, str):
        if choice in {"none", "auto", "required"}:
            return choice, None
    elif choice.get("type") == "function":
        return "required", [_named(choice)]
    elif choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        if isinstance(allowed, dict) and allowed.get("mode") in {"auto", "required"}:
            tools = allowed.get("tools")
            if isinstance(tools, list) and tools:
                return allowed["mode"], [_named(tool) for tool in tools]
    raise InvalidRequestError(f"`tool_choice` must be {_CHOICES}, in OpenAI's shape.")


def _named(tool: object) -> Any:
    """Return the name that a tool has in chat completions, or in responses."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
