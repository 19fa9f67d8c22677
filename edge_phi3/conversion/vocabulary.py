"""The tokenizer files of a checkpoint -> the vocabulary of a GGUF.

Pieces and scores come from ``tokenizer.model``; ``added_tokens.json``, ``tokenizer_config.json`` and
``tokenizer.json`` add and retype tokens, in this order; ids that none of them fills become unused
``[PAD<id>]`` tokens, as in llama.cpp's converter. Beyond its keys, one of our own is written:

- ``edge_phi3.tokenizer.added_tokens`` (string): a JSON array of the added tokens, which are found in a text
  before anything else, by id: ``{"id", "content", "special", "lstrip", "rstrip"}``. llama.cpp has no key for
  the two flags (whether a token swallows the white space before and after it), only a rule that goes by the
  model's name. The value is a string because llama.cpp's C API gives no arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import gguf

from edge_phi3.conversion.checkpoint import read_json
from edge_phi3.conversion.errors import UnsupportedModelError, VocabularyError
from edge_phi3.conversion.sentencepiece import ModelType, PieceType, read_sentencepiece

ADDED_TOKENS_KEY = "edge_phi3.tokenizer.added_tokens"

_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0

# llama.cpp looks these up by text when a model is called Phi-3, and cannot load it when one is absent.
_REQUIRED_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")

_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text as a whole, with its entry's flags."""

    text: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A GGUF vocabulary: three lists of `vocab_size` entries, and the added tokens by id."""

    folder: Path
    tokens: list[str]
    scores: list[float]
    types: list[int]
    added: dict[int, AddedToken]
    add_special: dict[str, bool]

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``tokenizer.*`` keys, the chat template among them, and ours."""
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.tokens)
        writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        self._write_special_tokens(writer)
        added = [
            {"id": token_id, "content": token.text, "special": token.special}
            | {"lstrip": token.lstrip, "rstrip": token.rstrip}
            for token_id, token in sorted(self.added.items())
        ]
        writer.add_string(ADDED_TOKENS_KEY, json.dumps(added, ensure_ascii=False))

    def _write_special_tokens(self, writer: gguf.GGUFWriter) -> None:
        # It warns of templates for pairs of texts, which nobody tokenises here.
        log = logging.getLogger("gguf.vocab")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            special = gguf.SpecialVocab(self.folder, n_vocab=len(self.tokens))
            # As in transformers, where the configuration's word counts and not the post-processor's.
            special.add_special_token |= self.add_special
            special.add_to_gguf(writer, quiet=True)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise VocabularyError(f"The tokenizer files in {self.folder} make no sense ({error!r}).") from error
        finally:
            log.setLevel(level)


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the tokenizer files in `folder` for a model whose embedding has `vocab_size` rows.

    Raises:
        UnsupportedModelError: the tokenizer is of another kind.
        VocabularyError: files are missing, damaged, disagree, or have more tokens than the embedding has rows.
    """
    config = read_json(folder / "tokenizer_config.json") or {}
    fast = read_json(folder / "tokenizer.json")
    if str(config.get("tokenizer_class", "")).startswith("GPT2Tokenizer"):
        raise UnsupportedModelError(
            "tokenizer_config.json: the tokenizer is GPT2Tokenizer, as in Phi-4; only Phi-3's, "
            "a LlamaTokenizer, can be converted."
        )
    model = read_sentencepiece(folder / "tokenizer.model")
    if model.model_type is not ModelType.BPE:
        raise UnsupportedModelError(
            f"tokenizer.model is a {model.model_type.name.lower()} model; Phi-3's is byte-pair encoding."
        )
    if len(model.pieces) > vocab_size:
        raise VocabularyError(
            f"tokenizer.model has {len(model.pieces)} pieces, but the model's vocab_size is {vocab_size}."
        )
    if fast is not None:
        _check_tokenizer_json(fast, [piece.text for piece in model.pieces])
    tokens = [piece.text for piece in model.pieces]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    unused = vocab_size - len(model.pieces)
    scores = [piece.score for piece in model.pieces] + [_UNUSED_SCORE] * unused
    types = [int(piece.type) for piece in model.pieces] + [int(PieceType.UNUSED)] * unused
    added = _added_tokens(folder, config, fast)
    for token_id, token in added.items():
        if not 0 <= token_id < vocab_size:
            raise VocabularyError(
                f"The token {token.text!r} has the id {token_id}, but the model's vocab_size is {vocab_size}."
            )
        tokens[token_id] = token.text
        scores[token_id] = _ADDED_SCORE
        types[token_id] = PieceType.CONTROL if token.special else PieceType.USER_DEFINED
    if len(set(tokens)) < vocab_size:
        twice = collections.Counter(tokens).most_common(1)[0][0]
        raise VocabularyError(f"The vocabulary has the token {twice!r} twice.")
    if missing := [text for text in _REQUIRED_TOKENS if text not in tokens]:
        raise VocabularyError(f"The vocabulary lacks {' and '.join(missing)}, which every Phi-3 model has.")
    add_special = {role: config.get(f"add_{role}_token") for role in ("bos", "eos")}
    stated = {role: value for role, value in add_special.items() if isinstance(value, bool)}
    return Vocabulary(folder, tokens, scores, types, added, stated)


def _added_tokens(folder: Path, config: dict[str, Any], fast: dict[str, Any] | None) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    for text, token_id in (read_json(folder / "added_tokens.json") or {}).items():
        if type(token_id) is not int:
            raise VocabularyError(f"added_tokens.json: the id of {text!r} is {token_id!r}, not a whole number.")
        added[token_id] = AddedToken(text)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(re.fullmatch(r"[0-9]{1,9}", key) for key in decoder):
        raise VocabularyError("tokenizer_config.json: added_tokens_decoder must be an object with ids as keys.")
    for key, entry in decoder.items():
        added[int(key)] = _added_token(entry, "tokenizer_config.json")
    listed = (fast or {}).get("added_tokens") or []
    if not isinstance(listed, list):
        raise VocabularyError("tokenizer.json: added_tokens must be a list.")
    for entry in listed:
        token = _added_token(entry, "tokenizer.json")
        if type(entry.get("id")) is not int:
            raise VocabularyError(f"tokenizer.json: the added token {token.text!r} has no id.")
        added[entry["id"]] = token
    return added


def _added_token(entry: object, source: str) -> AddedToken:
    match entry:
        case {"content": str(text)} if text:
            pass
        case _:
            raise VocabularyError(f"{source}: an added token has no content.")
    assert isinstance(entry, dict)
    for flag in ("single_word", "normalized"):
        if entry.get(flag):
            raise UnsupportedModelError(
                f"{source}: {text!r} is a {flag} token, which no token of Phi-3 is; llama.cpp would find it elsewhere."
            )
    return AddedToken(text, *(bool(entry.get(flag)) for flag in ("special", "lstrip", "rstrip")))


def _check_tokenizer_json(fast: dict[str, Any], pieces: list[str]) -> None:
    model = fast.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedModelError("tokenizer.json: its model is not byte-pair encoding, as Phi-3's is.")
    if fast.get("normalizer") != _NORMALIZER or fast.get("pre_tokenizer") is not None:
        raise UnsupportedModelError(
            "tokenizer.json: its normalizer or pre_tokenizer differs from Phi-3's (prepend '▁', replace ' ' "
            "by '▁', no pre-tokenizer); llama.cpp would split texts in another way."
        )
    for text, token_id in model["vocab"].items():
        if type(token_id) is not int or not 0 <= token_id < len(pieces) or pieces[token_id] != text:
            raise VocabularyError(f"tokenizer.json and tokenizer.model disagree on {text!r} (id {token_id}).")
