"""What the published models of the family say of themselves, for GGUF files that do not say it.

llama.cpp's converter writes neither which white space a token swallows, nor which tokens a decoded text leaves out, nor
all tokens that end an answer. A file of our converter says it all, and nothing here is asked. What Phi-3's tokens
swallow is llama.cpp's rule too (llama-vocab.cpp), but there the model's name decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

_SYSTEM_USER_ASSISTANT: Final = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>%s' + message['content'] + '<|end|>%s' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>%s' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Family:
    """Some models' rules.

    Attributes:
        ends: the tokens that end an answer in every ``generation_config.json``.
        chat_template: for files without one.
        lstrip: whether tokens swallow the white space before them.
        rstrip: whether they swallow that after them.
        keeps_space: tokens that swallow none.
        not_special: tokens that a decoded text keeps, though GGUF files call them control tokens.
    """

    ends: tuple[str, ...] = ()
    chat_template: str = _SYSTEM_USER_ASSISTANT.replace("%s", "")
    lstrip: bool = False
    rstrip: bool = False
    keeps_space: frozenset[str] = frozenset()
    not_special: frozenset[str] = frozenset()


_PHI_3 = Family(
    ends=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    chat_template=_SYSTEM_USER_ASSISTANT.replace("%s", "\\n"),
    rstrip=True,
    keeps_space=frozenset({"<unk>", "<s>", "<|endoftext|>"}),
    not_special=frozenset({"</s>"}),
)
_PHI_4_MINI = Family(
    ends=("<|endoftext|>", "<|end|>"),
    rstrip=True,
    keeps_space=frozenset({"<|endoftext|>", "<|endofprompt|>"}),
    not_special=frozenset({"<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"}),
)
_PHI_4 = Family(
    ends=("<|endoftext|>", "<|im_end|>"),
    chat_template=(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    lstrip=True,
    rstrip=True,
)
_OTHER = Family()

_BY_TOKEN: Final[Mapping[str, Family]] = {"<|im_sep|>": _PHI_4, "<|tool_call|>": _PHI_4_MINI, "<|user|>": _PHI_3}
"""The first of these tokens that a vocabulary has tells whose it is."""


def family_of(control: Collection[str]) -> Family:
    """Return the rules of the models whose vocabulary has these control tokens."""
    return next((family for token, family in _BY_TOKEN.items() if token in control), _OTHER)
