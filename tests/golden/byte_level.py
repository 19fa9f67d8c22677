"""Byte-level tokenizer files, as the repositories of Phi-4 and Phi-4-mini have them, with vocabularies of any size.

The small ones learnt their merges from a few texts (``tests/data/byte-level-merges.txt``); the added tokens, their
flags, templates and order of ids are the published models'.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edge_phi3.byte_level import PATTERNS
from tests.golden.vocabularies import AddedToken

MERGES = Path(__file__).parent.parent / "data" / "byte-level-merges.txt"


@dataclasses.dataclass(frozen=True)
class Style:
    """What a published tokenizer has beside its merges.

    Attributes:
        pre: llama.cpp's name of its pre-tokenizer.
        base: its tokens without added ones; the real id of the first added token, less its place in `added`.
        added: added tokens, by their ids less `base`, with their flags.
        strips: the flags of the tokens that swallow white space.
        keeps_space: tokens that do not.
        not_special: tokens that are not special.
        roles: the texts of the beginning, end and padding tokens.
        ends: those that end an answer.
        template: the chat template.
    """

    pre: str
    base: int
    added: dict[int, str]
    strips: dict[str, bool]
    keeps_space: tuple[str, ...]
    not_special: tuple[str, ...]
    roles: dict[str, str]
    ends: tuple[str, ...]
    template: str


_TOOLS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>")
_PHI_4_MINI_TURNS = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

PHI_4_MINI = Style(
    pre="gpt-4o",
    base=199998,
    added={1: "<|endoftext|>", 20: "<|endofprompt|>", 21: "<|assistant|>", 22: "<|end|>", 23: "<|user|>"}
    | {24: "<|system|>", **{25 + i: text for i, text in enumerate(_TOOLS)}, 30: "<|tag|>"},
    strips={"rstrip": True},
    keeps_space=("<|endoftext|>", "<|endofprompt|>"),
    not_special=_TOOLS,
    roles=dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    ends=("<|end|>", "<|endoftext|>"),
    template=_PHI_4_MINI_TURNS,
)
PHI_4_MINI_REASONING = dataclasses.replace(
    PHI_4_MINI,
    template="{{ '<|system|>Your name is Phi, an AI math expert developed by Microsoft.<|end|>' }}" + _PHI_4_MINI_TURNS,
)
_PHI_4_NAMED = {1: "<|endoftext|>", 2: "<|fim_prefix|>", 3: "<|fim_middle|>", 4: "<|fim_suffix|>"}
_PHI_4_NAMED |= {8: "<|im_start|>", 9: "<|im_end|>", 10: "<|im_sep|>", 20: "<|endofprompt|>"}
_PHI_4_DUMMIES = [place for place in range(96) if place not in _PHI_4_NAMED]
_PHI_4_ADDED = _PHI_4_NAMED | {place: f"<|dummy_{number}|>" for number, place in enumerate(_PHI_4_DUMMIES)}
PHI_4 = Style(
    pre="dbrx",
    base=100256,
    added=_PHI_4_ADDED,
    strips={"lstrip": True, "rstrip": True},
    keeps_space=(),
    not_special=(),
    roles={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": _PHI_4_ADDED[95]},
    ends=("<|endoftext|>", "<|im_end|>"),
    template=(
        "{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + "
        "message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant"
        "<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
)


@dataclasses.dataclass(frozen=True)
class ByteLevelVocabulary:
    """Tokens by id, pairs of tokens that are merged, and what else a style has."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    style: Style

    @property
    def added(self) -> tuple[AddedToken, ...]:
        style = self.style
        return tuple(
            AddedToken(
                len(self.tokens) + place,
                text,
                special=text not in style.not_special,
                **({} if text in style.keeps_space else style.strips),
            )
            for place, text in sorted(style.added.items())
        )

    def __len__(self) -> int:
        return max(token.id for token in self.added) + 1

    def id_of(self, text: str) -> int:
        return next(token.id for token in self.added if token.content == text)

    def config(self) -> dict[str, Any]:
        """Return the entries of ``config.json`` on special tokens."""
        roles = {role: self.id_of(text) for role, text in self.style.roles.items() if role != "unk_token"}
        return {f"{role}_id": token_id for role, token_id in roles.items()}

    def tokenizer_json(self) -> dict[str, Any]:
        split = {
            "type": "Split",
            "pattern": {"Regex": PATTERNS[self.style.pre][0]},
            "behavior": "Removed",
            "invert": True,
        }
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(self.tokens)} | self._added_behind_gaps(),
            "merges": [merge.split(" ") for merge in self.merges],
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [vars(token) for token in self.added],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": byte_level | {"use_regex": True},
            "decoder": byte_level | {"use_regex": True},
            "model": model,
        }

    def _added_behind_gaps(self) -> dict[str, int]:
        """Return the added tokens that do not follow another: `tokenizers` takes their ids from the vocabulary."""
        ids = {token.id for token in self.added}
        return {t.content: t.id for t in self.added if t.id - 1 not in ids and t.id != len(self.tokens)}

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files, and ``generation_config.json``."""
        style = self.style
        config = {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(token.id): {name: value for name, value in vars(token).items() if name != "id"}
                for token in self.added
            },
            "chat_template": style.template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
            "tokenizer_class": "GPT2Tokenizer",
            **style.roles,
        }
        ends = [self.id_of(text) for text in style.ends]
        for name, content in {
            "tokenizer.json": self.tokenizer_json(),
            "tokenizer_config.json": config,
            "special_tokens_map.json": style.roles,
            "added_tokens.json": {token.content: token.id for token in self.added},
            "vocab.json": {token: i for i, token in enumerate(self.tokens)},
            "generation_config.json": self.config() | {"_from_model_config": True, "eos_token_id": ends},
        }.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        lines = "".join(f"{merge}\n" for merge in self.merges)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")


def alphabet() -> list[str]:
    """Return the character that stands for each byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


@functools.cache
def small_vocabulary(style_name: str) -> ByteLevelVocabulary:
    """Return the vocabulary of 1,100 tokens in the style `PHI_4_MINI`, `PHI_4_MINI_REASONING` or `PHI_4`."""
    merges = MERGES.read_text(encoding="utf-8").splitlines()
    tokens = (*sorted(alphabet()), *(merge.replace(" ", "") for merge in merges))
    return ByteLevelVocabulary(tokens, tuple(merges), globals()[style_name])


def reference_tokenizer(folder: Path) -> Tokenizer:
    """Return what ``tokenizer.json`` in a folder says, as `tokenizers` reads it.

    Some versions of it number added tokens anew; whose ids stand in the vocabulary too keep them.
    """
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    return Tokenizer.from_str(json.dumps(content))
