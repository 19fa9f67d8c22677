"""What ``tokenizer.json`` says of a vocabulary like Phi-3's: its pieces, and what it puts in front of a text.

transformers makes the file of a SentencePiece model: every way to join two pieces to a third is a merge, in the order
of the third's score. So the scores follow from the merges, and llama.cpp, which goes by the scores, splits texts alike.
"""

from typing import Annotated, Any, Literal

import msgspec

from edge_phi3.conversion.errors import CheckpointError, UnsupportedModelError
from edge_phi3.conversion.sentencepiece import Piece, PieceType

Prefix = Literal["prepend", "always", "first", "never"]
"""Before which parts of a text, split at the added tokens, a "▁" is put: all; all that have none; the text's first part
if it has none; none."""

_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_NORMALIZERS = [[_PREPEND, _SPACE], [_SPACE, _PREPEND]]
_UNLIKE_SENTENCEPIECE = ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


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


def steps_of(part: object) -> list[Any]:
    """Return the steps of a normalizer or pre-tokenizer: those of a sequence, itself, or none."""
    if isinstance(part, dict) and part.get("type") == "Sequence":
        steps = part.get("normalizers", part.get("pretokenizers"))
        return steps if isinstance(steps, list) else [part]
    return [] if part is None else [part]


def prefix_of(fast: FastTokenizer) -> Prefix:
    """Return what is put in front of texts, where the whole of normalizer and pre-tokenizer is that, as in Phi-3's."""
    normalizers, words = steps_of(fast.normalizer), steps_of(fast.pre_tokenizer)
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

    Raises:
        CheckpointError: a merge has parts that are no pieces.
        UnsupportedModelError: no scores give what the merges give.
    """
    wrong = {"byte_fallback is off": not model.byte_fallback, "it lacks bytes": not model.vocab.keys() >= _BYTES}
    wrong |= {f"{name} is set": bool(getattr(model, name)) for name in _UNLIKE_SENTENCEPIECE}
    if found := next((name for name, is_so in wrong.items() if is_so), None):
        raise _unlike(found)
    scores = _scores(model, {token.content for token in added.values()})
    kinds = dict.fromkeys(_BYTES, PieceType.BYTE) | {model.unk_token or "<unk>": PieceType.UNKNOWN}
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
    for text in vocab.keys() - added - _BYTES:
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
