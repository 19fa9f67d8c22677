"""Conversations, which a model's chat template makes prompts of."""

import atexit
import contextlib
import functools
import hashlib
import json
import logging
import signal
import threading
import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from edge_phi3 import templates
from edge_phi3.engine.family import KNOWN_TEMPLATES
from edge_phi3.llama.child_process import ChildProcess, WorkerDiedError
from edge_phi3.pipeline.prompt import PromptError
from edge_phi3.pipeline.tool_calls import BARE_MARKS, with_tools, without_tool_turns

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]


class ChatTemplate:
    """A chat template in Jinja, as transformers runs it. One that is `foreign`, not the family's own, runs apart.

    One that cannot be compiled refuses every conversation. One that leaves system messages out without a word, as
    Microsoft's first for Phi-3 did, gets each of them at the beginning of the user message that follows. What one does
    not say of tools is said for it, see `edge_phi3.pipeline.tool_calls`.

    Args:
        source: the template.
        special_tokens: what it finds as ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``.
        call_marks: what stands around a list of calls.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        call_marks: tuple[str, str] = BARE_MARKS,
    ) -> None:
        encoded = source.encode(errors="replace")
        self._source, self._special_tokens = encoded.decode(), special_tokens
        self._call_marks = call_marks
        self._names_tools = "tool" in source
        self._merges_system = False
        self.foreign = hashlib.sha256(encoded).hexdigest() not in KNOWN_TEMPLATES
        _, self._refusal = self._attempt("")
        if self._refusal:
            logger.warning("Conversations are refused: %s", self._refusal)
            return
        probe = [{"role": "system", "content": (marker := _marker())}, {"role": "user", "content": "Hello"}]
        try:
            self._merges_system = marker not in self._run(probe, {})
        except PromptError:
            return  # it refuses them itself, or needs more than this
        if self._merges_system:
            logger.warning(
                "The model's chat template has no system role: system messages are put in front of the user's."
            )

    def _attempt(self, names: str) -> tuple[str, str]:
        """Return what it makes of values in JSON, and why nothing; without any it is compiled."""
        job = templates.Job(self._source, names)
        rendered = _APART.attempt(job) if self.foreign else templates.attempt(job)
        text, problem = json.loads(rendered.outcome)
        return text, problem

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Return a conversation as the model's prompt.

        Args:
            messages: one or more, with `role` and `content`; an assistant's may have `tool_calls`, and that of a tool
                `tool_call_id`, in OpenAI's shapes.
            add_generation_prompt: whether the header of an assistant's turn follows; by default when the last message
                is not continued.
            continue_final_message: whether the prompt ends with exactly the text of the last message; by default when
                that is the assistant's and `add_generation_prompt` is not given.
            kwargs: what else the template finds by name.
            tools: functions that may be called, in OpenAI's shape.

        Raises:
            PromptError: the arguments contradict each other, or the template refuses the conversation.
        """
        for role in (str(message.get("role")) for message in messages):
            if role not in _ROLES:
                raise PromptError(f"messages: role must be one of {', '.join(_ROLES)}, not {role[:40]!r}.")
        if continue_final_message is None:
            continue_final_message = add_generation_prompt is None and messages[-1]["role"] == "assistant"
        elif continue_final_message and add_generation_prompt:
            raise PromptError("`add_generation_prompt` must not be true beside `continue_final_message`.")
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            messages = without_tool_turns(
                messages, self._call_marks, calls="calls" in self._shows, results="results" in self._shows
            )
        if tools and "tools" in self._shows:
            kwargs = {**kwargs, "tools": tools}
        elif tools:
            messages = with_tools(messages, tools, self._call_marks, field="field" in self._shows)
        if self._merges_system:
            messages = _without_system(messages)
        if not continue_final_message:
            return self._run(messages, {**kwargs, "add_generation_prompt": add_generation_prompt is not False})
        # The template may strip the text, repeat it, or spell it anywhere else: a marker stands for it.
        *before, last = messages
        marker = _marker()
        rendered = self._run([*before, {**last, "content": marker}], {**kwargs, "add_generation_prompt": False})
        begun, found, _ = rendered.rpartition(marker)
        if not found:
            raise PromptError("messages: the model's chat template leaves the last one out, so it cannot be continued.")
        return begun.replace(marker, last["content"]) + str(last["content"])

    @functools.cached_property
    def _shows(self) -> frozenset[str]:
        """What it writes of tools: `tools` itself or as a field of the system message, calls, and their results."""
        if not self._names_tools:
            return frozenset()
        marker, user = _marker(), {"role": "user", "content": "Hello"}
        function = {"name": marker, "description": "", "parameters": {}, "arguments": {}}
        call = {"id": "c", "type": "function", "function": function}
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        tried: dict[str, tuple[list[Message], dict[str, Any]]] = {
            "tools": ([user], {"tools": [{"type": "function", "function": function}]}),
            "field": ([{"role": "system", "content": "", "tools": marker}, user], {}),
            "calls": ([user, calls], {}),
            "results": ([user, {"role": "tool", "content": marker, "name": "f", "tool_call_id": "c"}], {}),
        }
        found = set()
        for name, (messages, kwargs) in tried.items():
            with contextlib.suppress(PromptError):
                found |= {name} if marker in self._run(messages, kwargs) else set()
        return frozenset(found)

    def _run(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
        names = {"tools": None, "documents": None, **self._special_tokens, **kwargs, "messages": messages}
        text, problem = ("", self._refusal) if self._refusal else self._attempt(json.dumps(names, default=dict))
        if problem:
            raise PromptError(f"messages: {problem}")
        return text


def _marker() -> str:
    """Return a word that no text contains."""
    return uuid.uuid4().hex


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Put system messages in front of the next user message; where none follows, they become one in their place."""
    turns: list[Message] = []
    held: list[str] = []
    place = 0
    for message in messages:
        if message["role"] == "system":
            place = place if held else len(turns)
            held.append(message["content"])
        elif message["role"] == "user" and held:
            turns.append({**message, "content": "\n".join([*held, message["content"]])})
            held = []
        else:
            turns.append(message)
    if held:
        turns.insert(place, {"role": "user", "content": "\n".join(held)})
    return turns


class _Apart:
    """The process that renders the templates of strangers, started when it is first needed and after each end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: ChildProcess | None = None
        atexit.register(self.close)

    def attempt(self, job: templates.Job) -> templates.Rendered:
        """Do a job there."""
        with self._lock:
            try:
                if self._process is None:
                    self._process = ChildProcess(templates.__name__, templates.Rendered, gpu="").__enter__()
                self._process.send(job)
                rendered: templates.Rendered = self._process.receive()
                return rendered
            except (WorkerDiedError, OSError) as error:
                logger.warning("The process of the chat template has ended: %s.", error)
                self.close()
                cause = f"the model's chat template ends its process ({error})."
                if signal.SIGXCPU.name in str(error):
                    cause = f"the model's chat template takes more than {templates.MOST_SECONDS} s of the processor."
                return templates.Rendered.of(problem=cause)

    def close(self) -> None:
        """End the process."""
        if (process := self._process) is not None:
            self._process = None
            process.__exit__(None, None, None)


_APART: Final = _Apart()
