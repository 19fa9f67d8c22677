"""Conversations, which a model's chat template makes prompts of."""

from __future__ import annotations

import datetime as dt
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from edge_phi3.pipeline.prompt import PromptError

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]


class ChatTemplate:
    """A chat template in Jinja, as transformers runs it.

    One that cannot be compiled refuses every conversation. One that leaves system messages out without a word, as
    Microsoft's first for Phi-3 did, gets each of them at the beginning of the user message that follows.

    Args:
        source: the template.
        special_tokens: what it finds as ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] = MappingProxyType({})) -> None:
        self._special_tokens = special_tokens
        self._template: jinja2.Template | None = None
        self._merges_system = False
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except Exception as error:  # noqa: BLE001 - a template comes from anywhere; the model answers prompts without it
            self._refusal = f"the model's chat template cannot be compiled ({error}); send `prompt` instead"
            logger.warning("Conversations are refused: %s.", self._refusal)
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

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return a conversation as the model's prompt.

        Args:
            messages: one or more, with `role` and `content`.
            add_generation_prompt: whether the header of an assistant's turn follows; by default when the last message
                is not continued.
            continue_final_message: whether the prompt ends with exactly the text of the last message; by default when
                that is the assistant's and `add_generation_prompt` is not given.
            kwargs: what else the template finds by name.

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

    def _run(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
        if self._template is None:
            raise PromptError(f"messages: {self._refusal}.")
        names = {"tools": None, "documents": None, **self._special_tokens, **kwargs, "messages": messages}
        try:
            return self._template.render(names)
        except jinja2.TemplateError as error:
            raise PromptError(f"messages: the model's chat template refuses them: {error}") from error
        except Exception as error:  # what a template can do wrong has no end
            raise PromptError(
                f"messages: the model's chat template fails on them ({type(error).__name__}: {error})."
            ) from error


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


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, with which templates mark what an assistant said, for training."""

    tags = {"generation"}  # noqa: RUF012 - so Jinja wants it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the block's content, which has a scope of its own."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(pattern: str) -> str:
    return dt.datetime.now().astimezone().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own writes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


# A template comes with a model file, from anywhere: it runs in the sandbox that transformers uses (CVE-2024-34359).
_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
_ENVIRONMENT.filters["tojson"] = _to_json
_ENVIRONMENT.globals.update({"raise_exception": _refuse, "strftime_now": _now})
