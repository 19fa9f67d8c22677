"""A byte-level vocabulary, as Phi-4 and Phi-4-mini have it, out of ``tokenizer.json``.

Tokens, types and merges are those that llama.cpp's converter writes. It recognises the pre-tokenizer by what becomes of
one text, and so whole vocabularies only; here its regular expression counts. Two keys of our own tell what llama.cpp
has no key for, where it is not as in the published checkpoints: `edge_phi3.byte_level.PATTERN_KEY` (string), and
`edge_phi3.byte_level.IGNORE_MERGES_KEY` (bool).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from edge_phi3 import byte_level
from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.sentencepiece import PieceType
from edge_phi3.conversion.tokenizer_json import BpeModel, FastTokenizer, steps_of

_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
"""Tokens that llama.cpp's converter makes control tokens, whatever the checkpoint calls them."""

_UNLIKE_PHI_4 = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class Words:
    """How texts are cut into words, and words into tokens.

    `pre` is llama.cpp's name of the regular expression `pattern`; `ids` are those of the tokens without added ones.
    """

    pre: str
    pattern: str
    ids: Mapping[str, int]
    merges: list[str]
    ignore_merges: bool

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add our keys, where they are needed."""
        if self.pattern != byte_level.pattern_of(self.pre):
            writer.add_string(byte_level.PATTERN_KEY, self.pattern)
        if self.ignore_merges:
            writer.add_bool(byte_level.IGNORE_MERGES_KEY, True)


def is_byte_level(fast: FastTokenizer) -> bool:
    """Return whether a tokenizer turns texts into bytes."""
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps_of(fast.pre_tokenizer))


def read_words(fast: FastTokenizer, model: BpeModel) -> Words:
    """Check a byte-level ``tokenizer.json``, and return what it says beside the added tokens."""
    odd = [name for name in _UNLIKE_PHI_4 if getattr(model, name)]
    post = fast.post_processor
    if post is not None and (not isinstance(post, dict) or post.get("type") != "ByteLevel"):
        odd.append("post_processor")
    if steps_of(fast.normalizer):
        odd.append("normalizer")
    if odd:
        raise UnsupportedModelError(f"tokenizer.json: it has a {odd[0]}, which no tokenizer of Phi-4 has.")
    pattern = _pattern(steps_of(fast.pre_tokenizer))
    pre = next((name for name, patterns in byte_level.PATTERNS.items() if pattern in patterns), None)
    if pre is None or pattern is None:
        raise UnsupportedModelError(
            f"tokenizer.json: its pre_tokenizer is none that llama.cpp has under {', '.join(byte_level.PATTERNS)}."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.merges]
    ignore_merges = bool(model.ignore_merges)
    try:
        byte_level.tokenizer(model.vocab, merges, pattern, ignore_merges=ignore_merges)
    except (byte_level.ByteLevelError, OverflowError) as error:
        raise CheckpointError(f"tokenizer.json: {error}.") from error
    return Words(pre, pattern, model.vocab, merges, ignore_merges)


def token_type(content: str, *, special: bool) -> PieceType:
    """Return the type of an added token."""
    control = special or _LOOKS_SPECIAL.fullmatch(content)
    return PieceType.CONTROL if control else PieceType.USER_DEFINED


def _pattern(steps: list[Any]) -> str | None:
    """Return the regular expression of a split into words that goes before the bytes."""
    if len(steps) == 1 and _is_bytes(steps[0], use_regex=True):
        return byte_level.pattern_of("gpt-2")
    if len(steps) != 2 or not _is_bytes(steps[1], use_regex=False) or not isinstance(steps[0], dict):
        return None
    split = {"behavior": "", "invert": False} | steps[0]
    expression = split.get("pattern")
    # All that matches stays, and so does what lies between, if anything did.
    whole = (split["behavior"], split["invert"]) in {("Isolated", False), ("Removed", True), ("Isolated", True)}
    if split.get("type") != "Split" or not whole or not isinstance(expression, dict):
        return None
    regex = expression.get("Regex")
    return regex if isinstance(regex, str) else None


def _is_bytes(step: object, *, use_regex: bool) -> bool:
    if not isinstance(step, dict) or step.get("type") != "ByteLevel" or step.get("add_prefix_space", True):
        return False
    return bool(step.get("use_regex", True)) is use_regex
