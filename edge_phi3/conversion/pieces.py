"""What the tokenizer files say of a vocabulary: its pieces, what goes in front of a text, how words are found.

``tokenizer.model`` is read with ``protobuf`` and not the ``sentencepiece`` package: a conversion needs three fields of
each piece. Message and field numbers: ``ModelProto`` in
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.

transformers makes Phi-3's ``tokenizer.json`` of it: every way to join two pieces to a third is a merge, in the order of
the third's score. So the scores follow from the merges, and llama.cpp, which goes by the scores, splits texts alike.

Of a byte-level vocabulary, as Phi-4's, the merges are those that llama.cpp's converter writes. It recognises the
pre-tokenizer by what becomes of one text, and so whole vocabularies only; here its regular expression counts.
"""

import enum
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import gguf
import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from edge_phi3 import byte_level
from edge_phi3.conversion import CheckpointError, UnsupportedModelError
from edge_phi3.files import read_bounded

MAX_BYTES = 64 << 20
"""Largest model file that is read; Phi-3's has half a megabyte."""

_BYTES, _FLOAT, _INT, _MESSAGE = 12, 2, 5, 11  # FieldDescriptorProto.Type
_MESSAGES: dict[str, list[tuple[str, int, int]]] = {
    "Piece": [("piece", 1, _BYTES), ("score", 2, _FLOAT), ("type", 3, _INT)],
    "Trainer": [("model_type", 3, _INT)],
    "Model": [("Piece", 1, _MESSAGE), ("Trainer", 2, _MESSAGE)],
}


Prefix = Literal["prepend", "always", "first", "never"]
"""Before which parts of a text, split at the added tokens, a "▁" is put: all; all that have none; the text's first part
if it has none; none."""

_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_NORMALIZERS = [[_PREPEND, _SPACE], [_SPACE, _PREPEND]]
_UNLIKE_SENTENCEPIECE = ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
_UNLIKE_PHI_4 = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
_BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}

PieceType = enum.IntEnum("PieceType", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")
"""``ModelProto.SentencePiece.Type``; GGUF's token types have the same numbers."""

ModelType = enum.IntEnum("ModelType", "UNIGRAM BPE WORD CHAR")
"""``TrainerSpec.ModelType``."""


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float
    type: PieceType


def read_sentencepiece(path: Path) -> tuple[list[Piece], ModelType]:
    """Return the pieces and the type of a SentencePiece model."""
    try:
        message = _model_class().FromString(read_bounded(path, MAX_BYTES))
        pieces = [_piece(piece, index) for index, piece in enumerate(message.Piece)]
        if not pieces:
            raise ValueError("it has no pieces")
        return pieces, ModelType(message.Trainer.model_type or ModelType.UNIGRAM)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (DecodeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a sound SentencePiece model: {error}. Download it again.") from error


def _piece(message: Any, index: int) -> Piece:
    if not message.piece:
        raise ValueError(f"piece {index} is empty")
    if not math.isfinite(message.score):
        raise ValueError(f"piece {index} has the score {message.score}")
    return Piece(message.piece.decode("utf-8"), message.score, PieceType(message.type or PieceType.NORMAL))


@functools.cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="sentencepiece.proto", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            added = message.field.add(name=field, number=number, type=kind, label=3 if field == "Piece" else 1)
            if kind == _MESSAGE:
                added.type_name = field
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))


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


class FastTokenizer(msgspec.Struct):
    """Entries of ``tokenizer.json``."""

    model: Any = None
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    added_tokens: list[_ListedToken] | None = None


class BpeModel(msgspec.Struct):
    """Its ``model``; a merge is a pair, or in older files a text with a space between the two."""

    vocab: dict[str, int]
    merges: list[tuple[str, str] | str] = []
    unk_token: str | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _Metaspace(msgspec.Struct, tag="Metaspace", tag_field="type"):
    replacement: Literal["▁"] = "▁"
    prepend_scheme: Literal["always", "first", "never"] = "always"
    split: Literal[False] = False


def _steps_of(part: object) -> list[Any]:
    """Return the steps of a normalizer or pre-tokenizer: those of a sequence, itself, or none."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        steps = part.get("normalizers", part.get("pretokenizers"))
        return steps if isinstance(steps, list) else [part]
    return [] if part is None else [part]


def prefix_of(fast: FastTokenizer) -> Prefix:
    """Return what is put in front of texts, where the whole of normalizer and pre-tokenizer is that, as in Phi-3's."""
    normalizers, words = _steps_of(fast.normalizer), _steps_of(fast.pre_tokenizer)
    if normalizers in _NORMALIZERS and not words:
        return "prepend"
    if not normalizers and len(words) == 1 and isinstance(words[0], dict) and "split" in words[0]:
        try:
            return msgspec.convert(words[0], _Metaspace).prepend_scheme
        except msgspec.ValidationError:
            pass
    raise UnsupportedModelError(
        "tokenizer.json: its normalizer or pre_tokenizer differs from Phi-3's (prepend '▁', replace ' ' "
        "by '▁', no pre-tokenizer); llama.cpp would split texts in another way."
    )


def check_same_pieces(model: BpeModel, pieces: list[str], added: dict[int, AddedToken]) -> None:
    """Refuse a file that differs from ``tokenizer.model``, but for added tokens that it lists among the others."""
    for text, token_id in model.vocab.items():
        beyond = added[token_id].content if token_id in added else None
        if text != (pieces[token_id] if 0 <= token_id < len(pieces) else beyond):
            raise CheckpointError(f"tokenizer.json and tokenizer.model disagree on {text!r} (id {token_id}).")


def pieces_of(model: BpeModel, added: dict[int, AddedToken]) -> dict[int, Piece]:
    """Return the pieces of a vocabulary, by id, as a ``tokenizer.model`` would have them.

    `UnsupportedModelError` says that no scores give what the merges give.
    """
    wrong = {"byte_fallback is off": not model.byte_fallback, "it lacks bytes": not model.vocab.keys() >= _BYTE_PIECES}
    wrong |= {f"{name} is set": bool(getattr(model, name)) for name in _UNLIKE_SENTENCEPIECE}
    if found := next((name for name, is_so in wrong.items() if is_so), None):
        raise _unlike(found)
    scores = _scores(model, {token.content for token in added.values()})
    kinds = dict.fromkeys(_BYTE_PIECES, PieceType.BYTE) | {model.unk_token or "<unk>": PieceType.UNKNOWN}
    return {
        token_id: Piece(text, scores.get(text, 0.0), kinds.get(text, PieceType.NORMAL))
        for text, token_id in model.vocab.items()
    }


def _scores(model: BpeModel, added: set[str]) -> dict[str, float]:
    """Return the scores of merged pieces: what is merged first has the highest."""
    vocab = model.vocab
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in model.merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise CheckpointError(f"tokenizer.json: the merge {' '.join(pair)!r} is not of two pieces to a third.")
    known = set(pairs)
    for text in vocab.keys() - added - _BYTE_PIECES:
        for left, right in ((text[:cut], text[cut:]) for cut in range(1, len(text))):
            if left in vocab and right in vocab and (left, right) not in known:
                raise _unlike(f"{left!r} and {right!r} are not merged to {text!r}")
    last = {"".join(pair): rank for rank, pair in enumerate(pairs)}
    scores: dict[str, float] = {}
    begin = end = 0
    for rank, pair in enumerate(pairs):
        # The merges to a piece stand together. Only runs of one character, those of spaces above all, share a score,
        # and theirs stand mixed, the longest left part first.
        begin = rank if rank == end else begin
        end = max(end, last["".join(pair)] + 1)
        scores["".join(pair)] = -1.0 - begin
        same = "".join(pair) == "".join(pairs[begin])
        mixed = (
            rank > begin
            and [*map(len, pairs[rank - 1])] >= [*map(len, pair)]
            and len({*"".join(pairs[begin] + pair)}) == 1
        )
        if not same and not mixed:
            raise _unlike(f"the merges to {''.join(pairs[begin])!r} do not stand together")
    return scores


def _unlike(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"tokenizer.json: its model is not like SentencePiece's ({what}), as Phi-3's is; llama.cpp would split texts "
        "in another way. Put the tokenizer.model that it was made from beside it."
    )


class Words(NamedTuple):
    """How texts are cut into words, and words into tokens.

    `pre` is llama.cpp's name of the regular expression `pattern`; `ids` are those of the tokens without added ones.
    """

    pre: str
    pattern: str
    ids: Mapping[str, int]
    merges: list[str]
    ignore_merges: bool

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add two keys of our own, where it is not as in the published checkpoints, for which llama.cpp has none."""
        if self.pattern != byte_level.pattern_of(self.pre):
            writer.add_string(byte_level.PATTERN_KEY, self.pattern)
        if self.ignore_merges:
            writer.add_bool(byte_level.IGNORE_MERGES_KEY, True)


def read_words(fast: FastTokenizer, model: BpeModel) -> Words | None:
    """Check a byte-level ``tokenizer.json``, and return what it says beside the added tokens; None for any other."""
    if not any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in _steps_of(fast.pre_tokenizer)):
        return None
    odd = [name for name in _UNLIKE_PHI_4 if getattr(model, name)]
    post = fast.post_processor
    if post is not None and (not isinstance(post, dict) or post.get("type") != "ByteLevel"):
        odd.append("post_processor")
    if _steps_of(fast.normalizer):
        odd.append("normalizer")
    if odd:
        raise UnsupportedModelError(f"tokenizer.json: it has a {odd[0]}, which no tokenizer of Phi-4 has.")
    pattern = _pattern(_steps_of(fast.pre_tokenizer))
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
