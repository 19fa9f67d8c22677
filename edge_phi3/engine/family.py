"""What the published models of the family say of themselves, for GGUF files that do not say it.

llama.cpp's converter writes neither which white space a token swallows, nor which tokens a decoded text leaves out, nor
all tokens that end an answer. A file of our converter says it all, and nothing here is asked. What Phi-3's tokens
swallow is llama.cpp's rule too (llama-vocab.cpp), but there the model's name decides.
"""

import hashlib
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
    """Some models' rules: the tokens that end an answer in every ``generation_config.json``, and more.

    Attributes:
        chat_template: for files without one.
        lstrip: whether tokens swallow the white space before them, but for `keeps_space`; `rstrip`: that after them.
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


KNOWN_TEMPLATES: Final = frozenset(
    {
        "dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa",  # Phi-3-mini-4k-instruct
        "268b6082ceb7176dc6ed80557a2f7837f9f0339592fbee677d405a553af15f88",  # Phi-3-mini-4k-instruct, first revision
        "68e5b97472ceec7523b68d3678958db46f568999a43221ae354a6ba0bcf0a611",  # Phi-3-mini-128k-instruct, second revision
        "605841622bcb6572225608f09ec2afcdfb9fb50844ef52715a12689f7b9278b1",  # Phi-3-medium-4k-instruct
        "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90",  # Phi-3.5-mini-instruct
        "fe4120415a3858b873955c92ce3a103a95bc97c2cb00b72e62659aaf0f891ee5",  # phi-4
        "a41fb8727c4f1e722e53cb1ea935038a1177b8bdf09387f3b048f9da5255ef3e",  # phi-4, first revision
        "febf589225c9728ab791f52e8897d7607a823d45368f0a4c92fa68997b40cce9",  # Phi-4-mini-instruct
        "cbb504cb43fec3f8877d709d9f7a729441e56f41cb4fddd382675fab35de7fe1",  # Phi-4-mini-reasoning
        "82fbc9a9237f4009b7e16deca2c1dbb0dc6fb8f1042d025f6e7a001822b92fd9",  # the demo
        *(hashlib.sha256(each.chat_template.encode()).hexdigest() for each in (_PHI_3, _PHI_4, _OTHER)),
    }
)
"""SHA-256 of the chat templates that are known to do no harm: those published with the family's models, and ours."""
