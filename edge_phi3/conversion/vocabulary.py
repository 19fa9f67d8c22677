"""The tokenizer files of a checkpoint -> the vocabulary of a GGUF.

Pieces and scores come from ``tokenizer.model``, or the tokens of a byte-level vocabulary from ``tokenizer.json``;
``added_tokens.json``, ``tokenizer_config.json`` and ``tokenizer.json`` add and retype tokens, in this order; ids that
none of them fills become unused ``[PAD<id>]`` tokens, as in llama.cpp's converter. Beyond its keys, one of our own is
written:

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
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import gguf
import msgspec

from edge_phi3 import byte_level
from edge_phi3.conversion.byte_level_tokens import Words, is_byte_level, read_words, token_type
from edge_phi3.conversion.checkpoint import read_json, typed
from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.sentencepiece import ModelType, PieceType, read_sentencepiece

_T = TypeVar("_T")

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


class AddedToken(msgspec.Struct, frozen=True):
    """A token that is found in a text as a whole, with its entry's flags."""

    content: Annotated[str, msgspec.Meta(min_length=1)]
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class _ListedToken(AddedToken, frozen=True, kw_only=True):
    id: int


class _TokenizerConfig(msgspec.Struct):
    """Entries of ``tokenizer_config.json``."""

    added_tokens_decoder: dict[int, AddedToken] | None = None
    tokenizer_class: str | None = None
    add_bos_token: Any = None
    add_eos_token: Any = None


class _FastTokenizer(msgspec.Struct):
    """Entries of ``tokenizer.json``."""

    model: Any = None
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    added_tokens: list[_ListedToken] | None = None


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A GGUF vocabulary: three lists of `vocab_size` entries, and the added tokens by id.

    `words` is how a byte-level one finds words, None for SentencePiece's, where alone scores count.
    """

    folder: Path
    tokens: list[str]
    scores: list[float]
    types: list[int]
    added: dict[int, AddedToken]
    add_special: dict[str, bool]
    words: Words | None = None

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add the ``tokenizer.*`` keys, the chat template among them, and ours."""
        writer.add_tokenizer_model(byte_level.MODEL if self.words else "llama")
        writer.add_tokenizer_pre(self.words.pre if self.words else "default")
        writer.add_token_list(self.tokens)
        if self.words:
            self.words.write_metadata(writer)
        else:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        self._write_special_tokens(writer)
        flags = ("content", "special", "lstrip", "rstrip")
        added = [
            {"id": token_id} | {flag: getattr(token, flag) for flag in flags}
            for token_id, token in sorted(self.added.items())
        ]
        writer.add_string(ADDED_TOKENS_KEY, json.dumps(added, ensure_ascii=False))

    def _write_special_tokens(self, writer: gguf.GGUFWriter) -> None:
        # It warns of templates for pairs of texts, which nobody tokenises here.
        log = logging.getLogger("gguf.vocab")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            special = gguf.SpecialVocab(self.folder, load_merges=self.words is not None, n_vocab=len(self.tokens))
            # As in transformers, where the configuration's word counts and not the post-processor's.
            special.add_special_token |= self.add_special
            special.add_to_gguf(writer, quiet=True)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise CheckpointError(f"The tokenizer files in {self.folder} make no sense ({error!r}).") from error
        finally:
            log.setLevel(level)


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the tokenizer files in `folder` for a model whose embedding has `vocab_size` rows."""
    config = _read(folder / "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    fast = _read(folder / "tokenizer.json", _FastTokenizer)
    if fast is not None and is_byte_level(fast.pre_tokenizer):
        return _byte_level_vocabulary(folder, config, fast, vocab_size)
    if (config.tokenizer_class or "").startswith("GPT2Tokenizer"):
        raise UnsupportedModelError(
            "tokenizer_config.json: the tokenizer is GPT2Tokenizer, as in Phi-4, whose byte-level tokenizer.json is "
            "needed."
        )
    model = read_sentencepiece(folder / "tokenizer.model")
    if model.model_type is not ModelType.BPE:
        raise UnsupportedModelError(
            f"tokenizer.model is a {model.model_type.name.lower()} model; Phi-3's is byte-pair encoding."
        )
    if len(model.pieces) > vocab_size:
        raise CheckpointError(
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
    _check_ids({token.content: token_id for token_id, token in added.items()}, vocab_size)
    for token_id, token in added.items():
        tokens[token_id] = token.content
        scores[token_id] = _ADDED_SCORE
        types[token_id] = PieceType.CONTROL if token.special else PieceType.USER_DEFINED
    _refuse_what_is_there_twice(tokens)
    if missing := [text for text in _REQUIRED_TOKENS if text not in tokens]:
        raise CheckpointError(f"The vocabulary lacks {' and '.join(missing)}, which every Phi-3 model has.")
    add_special = {"bos": config.add_bos_token, "eos": config.add_eos_token}
    stated = {role: value for role, value in add_special.items() if isinstance(value, bool)}
    return Vocabulary(folder, tokens, scores, types, added, stated)


def _byte_level_vocabulary(folder: Path, config: _TokenizerConfig, fast: _FastTokenizer, vocab_size: int) -> Vocabulary:
    words = read_words(msgspec.structs.asdict(fast))
    added = _added_tokens(folder, config, fast)
    texts = {**words.ids, **{token.content: token_id for token_id, token in added.items()}}
    _check_ids(texts, vocab_size)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(PieceType.UNUSED)] * vocab_size
    for text, token_id in words.ids.items():
        tokens[token_id], types[token_id] = text, int(PieceType.NORMAL)
    for token_id, token in added.items():
        tokens[token_id], types[token_id] = token.content, int(token_type(token.content, special=token.special))
    _refuse_what_is_there_twice(tokens)
    # GPT2Tokenizer puts nothing in front of a text, whatever its configuration says.
    stated = {"bos": False} if config.add_bos_token else {}
    return Vocabulary(folder, tokens, [], types, added, stated, words)


def _check_ids(ids: Mapping[str, int], vocab_size: int) -> None:
    for text, token_id in ids.items():
        if not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"The token {text!r} has the id {token_id}, but the model's vocab_size is {vocab_size}."
            )


def _refuse_what_is_there_twice(tokens: list[str]) -> None:
    if len(set(tokens)) < len(tokens):
        twice = collections.Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(f"The vocabulary has the token {twice!r} twice.")


def _read(path: Path, kind: type[_T]) -> _T | None:
    content = read_json(path)
    return None if content is None else typed(content, kind, path.name)


def _added_tokens(folder: Path, config: _TokenizerConfig, fast: _FastTokenizer | None) -> dict[int, AddedToken]:
    added = {
        token_id: AddedToken(text)
        for text, token_id in (_read(folder / "added_tokens.json", dict[str, int]) or {}).items()
    }
    listed = {token.id: token for token in (fast and fast.added_tokens) or []}
    for name, tokens in (("tokenizer_config.json", config.added_tokens_decoder or {}), ("tokenizer.json", listed)):
        for token_id, token in tokens.items():
            if token.single_word or token.normalized:
                flag = "single_word" if token.single_word else "normalized"
                raise UnsupportedModelError(
                    f"{name}: {token.content!r} is a {flag} token, which no token of Phi-3 is; llama.cpp would find "
                    "it elsewhere."
                )
            added[token_id] = AddedToken(token.content, token.special, token.lstrip, token.rstrip)
    return added


def _check_tokenizer_json(fast: _FastTokenizer, pieces: list[str]) -> None:
    model = fast.model
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedModelError("tokenizer.json: its model is not byte-pair encoding, as Phi-3's is.")
    if fast.normalizer != _NORMALIZER or fast.pre_tokenizer is not None:
        raise UnsupportedModelError(
            "tokenizer.json: its normalizer or pre_tokenizer differs from Phi-3's (prepend '▁', replace ' ' "
            "by '▁', no pre-tokenizer); llama.cpp would split texts in another way."
        )
    for text, token_id in model["vocab"].items():
        if type(token_id) is not int or not 0 <= token_id < len(pieces) or pieces[token_id] != text:
            raise CheckpointError(f"tokenizer.json and tokenizer.model disagree on {text!r} (id {token_id}).")
