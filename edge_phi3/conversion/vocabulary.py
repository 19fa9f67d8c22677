"""The tokenizer files of a checkpoint -> the vocabulary of a GGUF.

Pieces and scores come from ``tokenizer.model``, or ``tokenizer.json`` where there is none; the tokens of a byte-level
vocabulary from ``tokenizer.json``. ``added_tokens.json``, ``tokenizer_config.json`` and ``tokenizer.json`` add and
retype tokens, in this order; ids that none of them fills become unused ``[PAD<id>]`` tokens, as in llama.cpp's
converter. Beyond its keys, two of our own are written, and those of `Words`:

- ``edge_phi3.tokenizer.added_tokens`` (string): a JSON array of the added tokens, which are found in a text
  before anything else, by id: ``{"id", "content", "special", "lstrip", "rstrip"}``. llama.cpp has no key for
  the two flags (whether a token swallows the white space before and after it), only a rule that goes by the
  model's name. A ``"normalized": true`` token is found after the others, in the text whose spaces are "▁" by then; its
  own text in the file has them too, so that llama.cpp finds it nowhere else. A ``"single_word": true`` token is not
  found in a word. The value is a string because llama.cpp's C API gives no arrays.
- ``edge_phi3.tokenizer.prefix`` (string): before which parts of a text a "▁" is put, where it is not Phi-3's rule; see
  `edge_phi3.conversion.pieces.Prefix`.
"""

import collections
import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gguf
import msgspec

from edge_phi3 import byte_level
from edge_phi3.conversion import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.json_files import read_json, read_text, typed
from edge_phi3.conversion.pieces import (
    AddedToken,
    BpeModel,
    FastTokenizer,
    ModelType,
    Piece,
    PieceType,
    Prefix,
    Words,
    check_same_pieces,
    pieces_of,
    prefix_of,
    read_sentencepiece,
    read_words,
)

_T = TypeVar("_T")

# It warns of templates for pairs of texts, which nobody tokenises here.
logging.getLogger("gguf.vocab").setLevel(logging.ERROR)

ADDED_TOKENS_KEY = "edge_phi3.tokenizer.added_tokens"
PREFIX_KEY = "edge_phi3.tokenizer.prefix"

_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0

_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
"""Added tokens of byte-level vocabularies that llama.cpp's converter makes control tokens, whatever they are called."""

# llama.cpp looks these up by text when a model is called Phi-3, and cannot load it when one is absent.
_REQUIRED_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")


class _TemplateFile(msgspec.Struct):
    chat_template: str | None = None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    added_tokens_decoder: dict[int, AddedToken] | None = None
    tokenizer_class: str | None = None
    add_bos_token: Any = None
    add_eos_token: Any = None
    chat_template: str | list[_NamedTemplate] | dict[str, str] | None = None


class Vocabulary(NamedTuple):
    """A GGUF vocabulary: three lists of `vocab_size` entries, and the added tokens by id.

    `words` is how a byte-level one finds words, None for SentencePiece's, where alone scores count.
    """

    folder: Path
    tokens: list[str]
    scores: list[float]
    types: list[int]
    added: dict[int, AddedToken]
    add_special: dict[str, bool]
    prefix: Prefix | None
    chat_template: str | list[dict[str, str]] | None
    words: Words | None

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
            {"id": token_id}
            | {flag: getattr(token, flag) for flag in flags}
            | {flag: True for flag in ("normalized", "single_word") if getattr(token, flag)}
            for token_id, token in sorted(self.added.items())
        ]
        writer.add_string(ADDED_TOKENS_KEY, json.dumps(added, ensure_ascii=False))
        if self.prefix not in {"prepend", None}:
            writer.add_string(PREFIX_KEY, self.prefix)
            # llama.cpp knows all parts, or none.
            writer.add_add_space_prefix(self.prefix == "always")

    def _write_special_tokens(self, writer: gguf.GGUFWriter) -> None:
        try:
            special = _special_vocab(self.folder, len(self.tokens))
            if self.words:
                special.merges = self.words.merges
            # Without tokenizer.json, nothing says that <s> is not put in front, as llama.cpp does.
            if (self.folder / "tokenizer.json").exists():
                special.add_special_token.setdefault("bos", False)
            # As in transformers, where the configuration's word counts and not the post-processor's.
            special.add_special_token |= self.add_special
            special.chat_template = self.chat_template
            special.add_to_gguf(writer, quiet=True)
            if named := writer.kv_data[0].get(gguf.Keys.Tokenizer.CHAT_TEMPLATES):
                named.value.sort()  # they come out of a set
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise CheckpointError(f"The tokenizer files in {self.folder} make no sense ({error!r}).") from error


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the tokenizer files in `folder` for a model whose embedding has `vocab_size` rows."""
    config = _read(folder / "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    fast = _read(folder / "tokenizer.json", FastTokenizer)
    bpe = _bpe(fast)
    words = read_words(fast, bpe) if fast and bpe else None
    if (config.tokenizer_class or "").startswith("GPT2Tokenizer") and words is None:
        raise UnsupportedModelError(
            "tokenizer_config.json: the tokenizer is GPT2Tokenizer, as in Phi-4, whose byte-level tokenizer.json is "
            "needed."
        )
    added = _added_tokens(folder, config, fast)
    prefix: Prefix | None = None
    if words is not None:
        # GPT2Tokenizer puts nothing in front of a text, whatever its configuration says.
        stated = {"bos": False} if config.add_bos_token else {}
        pieces = {token_id: Piece(text, 0.0, PieceType.NORMAL) for text, token_id in words.ids.items()}
    else:
        add_special = {"bos": config.add_bos_token, "eos": config.add_eos_token}
        stated = {role: value for role, value in add_special.items() if isinstance(value, bool)}
        pieces = _pieces(folder, bpe, added)
        prefix = prefix_of(fast) if fast is not None else "prepend"
    entries = pieces | _entries(added, pieces, prefix)
    if len(pieces) > vocab_size:
        file = next(name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).exists())
        raise CheckpointError(f"{file} has {len(pieces)} pieces, but the model's vocab_size is {vocab_size}.")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    scores = [_UNUSED_SCORE] * vocab_size
    types = [int(PieceType.UNUSED)] * vocab_size
    for token_id, (text, score, kind) in entries.items():
        if not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f"The token {added[token_id].content if token_id in added else text!r} has the id {token_id}, but the "
                f"model's vocab_size is {vocab_size}: resize_token_embeddings() of transformers makes rows for it."
            )
        tokens[token_id], scores[token_id], types[token_id] = text, score, int(kind)
    if len(set(tokens)) < vocab_size:
        twice = collections.Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(f"The vocabulary has the token {twice!r} twice.")
    if words is None and (missing := [text for text in _REQUIRED_TOKENS if text not in tokens]):
        raise CheckpointError(f"The vocabulary lacks {' and '.join(missing)}, which every Phi-3 model has.")
    template = _chat_template(folder, config)
    return Vocabulary(folder, tokens, scores, types, added, stated, prefix, template, words)


def _entries(added: dict[int, AddedToken], pieces: dict[int, Piece], prefix: Prefix | None) -> dict[int, Piece]:
    taken = {piece.text for piece in pieces.values()}
    entries = {}
    for token_id, token in added.items():
        control = token.special or (prefix is None and _LOOKS_SPECIAL.fullmatch(token.content))
        text, kind = token.content, PieceType.CONTROL if control else PieceType.USER_DEFINED
        alone = token.single_word and not token.special and prefix is not None
        if alone or (token.normalized and prefix == "prepend"):
            if token_id in pieces and pieces[token_id].text == text:
                continue  # It stays a piece as well, where it is not found as a token.
            # Parts of a text that are left for llama.cpp no longer have this in them, nor anything that contains it; or
            # have it in a word, and then no piece begins with this mark.
            text = f"\u2060{text}" if alone else f"▁{text.replace(' ', '▁')}"
            kind = PieceType.CONTROL if token.special else PieceType.NORMAL
            while text in taken:
                text = f"{text[0]}{text}"
            taken.add(text)
        entries[token_id] = Piece(text, _ADDED_SCORE, kind)
    return entries


def added_texts(folder: Path) -> set[str]:
    """Return the texts of the added tokens of the tokenizer in `folder`."""
    config = _read(folder / "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    added = _added_tokens(folder, config, _read(folder / "tokenizer.json", FastTokenizer))
    return {token.content for token in added.values()}


def _bpe(fast: FastTokenizer | None) -> BpeModel | None:
    if fast is None:
        return None
    if not isinstance(fast.model, dict) or fast.model.get("type", "BPE") != "BPE":
        raise UnsupportedModelError("tokenizer.json: its model is not byte-pair encoding, as Phi-3's is.")
    bpe = typed(fast.model, BpeModel, "tokenizer.json: model")
    if len(set(bpe.vocab.values())) < len(bpe.vocab):
        raise CheckpointError("tokenizer.json: two tokens of its vocabulary have the same id.")
    return bpe


def _pieces(folder: Path, bpe: BpeModel | None, added: dict[int, AddedToken]) -> dict[int, Piece]:
    """Return the pieces of ``tokenizer.model``, or of ``tokenizer.json`` where there is no such file, by id."""
    path = folder / "tokenizer.model"
    if not path.exists():
        if bpe is None:
            raise CheckpointError(f"{folder} has neither tokenizer.model nor tokenizer.json.")
        return pieces_of(bpe, added)
    pieces, kind = read_sentencepiece(path)
    if kind is not ModelType.BPE:
        raise UnsupportedModelError(f"tokenizer.model is a {kind.name.lower()} model; Phi-3's is byte-pair encoding.")
    if bpe is not None:
        check_same_pieces(bpe, [piece.text for piece in pieces], added)
    return dict(enumerate(pieces))


def _special_vocab(folder: Path, vocab_size: int) -> gguf.SpecialVocab:
    """Return what gguf finds in the JSON files, of which it is given what it needs, without marks and negative ids."""
    config = read_json(folder / "config.json") or {}
    fast = read_json(folder / "tokenizer.json")
    kept = {
        "config.json": {
            name: value
            for name, value in config.items()
            if name.endswith("_token_id") and not (isinstance(value, int) and value < 0)
        },
        "tokenizer.json": fast and {name: fast[name] for name in ("added_tokens", "post_processor") if fast.get(name)},
        "tokenizer_config.json": read_json(folder / "tokenizer_config.json"),
    }
    with tempfile.TemporaryDirectory(prefix="edge-phi3-") as temporary:
        for name, content in kept.items():
            if content is not None:
                (Path(temporary) / name).write_text(json.dumps(content), encoding="utf-8")
        return gguf.SpecialVocab(temporary, n_vocab=vocab_size)


def _chat_template(folder: Path, config: _TokenizerConfig) -> str | list[dict[str, str]] | None:
    """Return the template, or the named ones; as in transformers, a file of its own goes before the configuration."""
    stated: str | list[_NamedTemplate] | dict[str, str] | None = read_text(folder / "chat_template.jinja")
    if stated is None and (content := read_json(folder / "chat_template.json")) is not None:
        stated = typed(content, _TemplateFile, "chat_template.json").chat_template
    stated = config.chat_template if stated is None else stated
    if isinstance(stated, list):
        stated = {entry.name: entry.template for entry in stated}
    if others := sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named = {"default": stated} if isinstance(stated, str) else stated or {}
        stated = named | {path.stem: read_text(path) or "" for path in others}
    if isinstance(stated, dict):
        return [{"name": name, "template": text} for name, text in stated.items()]
    return stated


def _read(path: Path, kind: type[_T]) -> _T | None:
    content = read_json(path)
    return None if content is None else typed(content, kind, path.name)


def _added_tokens(folder: Path, config: _TokenizerConfig, fast: FastTokenizer | None) -> dict[int, AddedToken]:
    added = {
        token_id: AddedToken(text)
        for text, token_id in (_read(folder / "added_tokens.json", dict[str, int]) or {}).items()
    }
    listed: dict[int, AddedToken] = {}
    for entry in (fast and fast.added_tokens) or []:
        token = AddedToken(*(getattr(entry, flag) for flag in AddedToken.__struct_fields__))
        if listed.setdefault(entry.id, token).content != token.content:
            raise CheckpointError(f"tokenizer.json: two added tokens have the id {entry.id}.")
    return added | (config.added_tokens_decoder or {}) | listed
