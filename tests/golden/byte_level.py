"""Byte-level tokenizer files, as the repositories of Phi-4 and Phi-4-mini have them, with vocabularies of any size.

The small ones learnt their merges from a few texts (``tests/data/byte-level-merges.txt``); the added tokens, their
flags, templates and order of ids are the published models'.
"""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer

from edge_phi3.byte_level import PATTERNS
from tests.golden.vocabularies import AddedToken
from tests.support.cases import tables

MERGES = Path(__file__).parent.parent / "data" / "byte-level-merges.txt"


Style = SimpleNamespace
"""What a published tokenizer has beside its merges; byte_level.yaml says what is what."""

STYLES = {name: Style(**fields) for name, fields in tables(__file__)["STYLES"].items()}


@dataclasses.dataclass(frozen=True)
class ByteLevelVocabulary:
    """Tokens by id, pairs of tokens that are merged, and what else a style has."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    style: Style

    @property
    def added(self) -> tuple[AddedToken, ...]:
        added = []
        for place, text in sorted(self.style.added.items()):
            flags = {} if text in self.style.keeps_space else self.style.strips
            special = text not in self.style.not_special
            added.append(AddedToken(len(self.tokens) + place, text, special=special, **flags))
        return tuple(added)

    def __len__(self) -> int:
        return max(token.id for token in self.added) + 1

    def id_of(self, text: str) -> int:
        return next(token.id for token in self.added if token.content == text)

    def config(self) -> dict[str, Any]:
        """Return the entries of ``config.json`` on special tokens."""
        roles = {role: self.id_of(text) for role, text in self.style.roles.items() if role != "unk_token"}
        return {f"{role}_id": token_id for role, token_id in roles.items()}

    def tokenizer_json(self) -> dict[str, Any]:
        made: dict[str, Any] = copy.deepcopy(tables(__file__)["TOKENIZER"])
        made["added_tokens"] = [vars(token) for token in self.added]
        made["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": PATTERNS[self.style.pre][0]}
        made["model"]["vocab"] = {token: i for i, token in enumerate(self.tokens)} | self._added_behind_gaps()
        made["model"]["merges"] = [merge.split(" ") for merge in self.merges]
        return made

    def _added_behind_gaps(self) -> dict[str, int]:
        """Return the added tokens that do not follow another: `tokenizers` takes their ids from the vocabulary."""
        ids = {token.id for token in self.added}
        return {t.content: t.id for t in self.added if t.id - 1 not in ids and t.id != len(self.tokens)}

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files, and ``generation_config.json``."""
        decoder = {str(token.id): dict(list(vars(token).items())[1:]) for token in self.added}
        config = tables(__file__)["CONFIG"] | {"added_tokens_decoder": decoder, "chat_template": self.style.template}
        ends = [self.id_of(text) for text in self.style.ends]
        for name, content in {
            "tokenizer.json": self.tokenizer_json(),
            "tokenizer_config.json": config | self.style.roles,
            "special_tokens_map.json": self.style.roles,
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
    """Return the vocabulary of 1,100 tokens in one of `STYLES`."""
    merges = MERGES.read_text(encoding="utf-8").splitlines()
    tokens = (*sorted(alphabet()), *(merge.replace(" ", "") for merge in merges))
    return ByteLevelVocabulary(tokens, tuple(merges), STYLES[style_name])


def reference_tokenizer(folder: Path) -> Tokenizer:
    """Return what ``tokenizer.json`` in a folder says, as `tokenizers` reads it.

    Some versions of it number added tokens anew; whose ids stand in the vocabulary too keep them.
    """
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    return Tokenizer.from_str(json.dumps(content))
