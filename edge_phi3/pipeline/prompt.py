"""What goes in: prompts, and conversations that a model's chat template makes prompts of."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.tokenizer import DecodedPrompt
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.constraints import TokenConstraint

_ROLES = ("system", "user", "assistant")


class PromptError(EdgePhi3Error):
    """The prompt cannot be used as it is."""


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A request that has been checked and turned into tokens.

    Attributes:
        prompt_ids: token ids, int32, shape ``(prompt_tokens,)``.
        text: what they are as text.
        config: the resolved generation parameters.
        lead: text that each answer begins with: the prompt when the full text is returned, else nothing.
        clean_up: whether spaces before punctuation are removed.
        constraint: what the answers are held to, or None.
    """

    prompt_ids: NDArray[np.int32]
    text: DecodedPrompt
    config: GenerationConfig
    lead: str
    clean_up: bool
    constraint: TokenConstraint | None = None

    def with_config(self, **changes: Any) -> PreparedPrompt:
        """Return the same prompt with other generation parameters."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))


class ChatTemplate:
    """A chat template in Jinja.

    Args:
        source: the template.
        special_tokens: what it finds as ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] = MappingProxyType({})) -> None:
        self._special_tokens = special_tokens
        self._template = _compile(source)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a conversation as the model's prompt; one that ends with the assistant's words is continued."""
        for message in messages:
            if message.get("role") not in _ROLES:
                raise PromptError(f"messages: role must be one of {', '.join(_ROLES)}, not {message.get('role')!r}.")
        continued = messages[-1]["role"] == "assistant"
        try:
            text: str = self._template.render(
                messages=messages, add_generation_prompt=not continued, **self._special_tokens
            )
        except jinja2.TemplateError as error:
            raise PromptError(f"messages: the model's chat template refuses them: {error}") from error
        if continued:
            # transformers' continue_final_message: nothing after the last message's own words.
            last = messages[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)] if last in text else text
        return text


def _compile(source: str) -> jinja2.Template:
    # A template comes with a model file, from anywhere: it runs in the sandbox that transformers uses (CVE-2024-34359).
    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def now(pattern: str) -> str:
        return dt.datetime.now(tz=dt.UTC).strftime(pattern)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    functions: dict[str, Any] = {"raise_exception": refuse, "strftime_now": now}
    environment.globals.update(functions)
    return environment.from_string(source)
