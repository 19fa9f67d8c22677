"""Phi-3 tokenizer files, written without the libraries that usually write them.

The pieces are those of the real Phi-3 vocabulary (see ``tests/data/README.md``), whole or cut down to a few
hundred; the files are those of a Phi-3 repository on the Hub: ``tokenizer.model``, ``tokenizer.json``,
``added_tokens.json``, ``tokenizer_config.json``, ``special_tokens_map.json`` and ``generation_config.json``.
"""

import dataclasses
import functools
import json
import struct
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from edge_phi3.conversion.pieces import Piece, PieceType
from edge_phi3.demo import DEMO_CHECKPOINT

VOCABULARY_GGUF = Path(__file__).parent.parent / "data" / "ggml-vocab-phi-3.gguf"

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """One entry of ``added_tokens`` in ``tokenizer.json``, its fields in their order there."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The pieces of ``tokenizer.model`` in id order, and the added tokens (some of which are pieces too)."""

    pieces: tuple[Piece, ...]
    added: tuple[AddedToken, ...]

    def __len__(self) -> int:
        return max(len(self.pieces), *(token.id + 1 for token in self.added))

    def id_of(self, text: str) -> int:
        return next(token.id for token in self.added if token.content == text)


@functools.cache
def phi3_vocabulary(merges: int | None = None) -> Vocabulary:
    """Return the real Phi-3 vocabulary, or one cut down to its first `merges` merged pieces and ASCII.

    Whole (`merges` None) it has 32,011 tokens with their real ids; a model pads its embedding to 32,064.
    """
    fields = GGUFReader(VOCABULARY_GGUF).fields
    texts = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    names = [text for text in texts[32000:] if not text.startswith("[PAD")]
    types = [PieceType.UNKNOWN] + 2 * [PieceType.CONTROL] + 256 * [PieceType.BYTE] + 31741 * [PieceType.NORMAL]
    base = [Piece(*row) for row in zip(texts, 259 * [0.0] + scores[259:], types, strict=False)]
    if merges is not None:
        kept = [piece for piece in base[259 + merges :] if piece.text == "▁" or piece.text in _ASCII]
        base = base[: 259 + merges] + kept
    # `<|end|>` and its like swallow the white space after them; of the base model's tokens only `</s>` does.
    added = [
        AddedToken(0, "<unk>"),
        AddedToken(1, "<s>"),
        AddedToken(2, "</s>", rstrip=True, special=False),
        *(AddedToken(len(base) + i, name, rstrip=name != "<|endoftext|>") for i, name in enumerate(names)),
    ]
    return Vocabulary(tuple(base), tuple(added))


_ASCII = {chr(code) for code in range(33, 127)}


def write_tokenizer(folder: Path, vocabulary: Vocabulary, *, add_bos: bool = False) -> None:
    """Write the tokenizer files and ``generation_config.json`` of `vocabulary` into `folder`."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(vocabulary))
    _write_json(folder / "tokenizer.json", tokenizer_json(vocabulary, add_bos=add_bos))
    beyond = [token for token in vocabulary.added if token.id >= len(vocabulary.pieces)]
    _write_json(folder / "added_tokens.json", {token.content: token.id for token in beyond})
    decoder = {str(token.id): dict(list(vars(token).items())[1:]) for token in vocabulary.added}
    config = _of_the_demo("tokenizer_config.json") | {"add_bos_token": add_bos, "added_tokens_decoder": decoder}
    del config["chat_template"]
    _write_json(folder / "tokenizer_config.json", config | {"chat_template": CHAT_TEMPLATE.read_text("utf-8")})
    _write_json(folder / "special_tokens_map.json", _of_the_demo("special_tokens_map.json"))
    ends = [vocabulary.id_of(text) for text in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": ends, "pad_token_id": ends[0]}
    _write_json(folder / "generation_config.json", generation)


def tokenizer_json(vocabulary: Vocabulary, *, add_bos: bool = False) -> dict[str, Any]:
    """Return the ``tokenizer.json`` that transformers makes of a SentencePiece BPE model with byte fallback."""
    made: dict[str, Any] = _of_the_demo("tokenizer.json")
    made["added_tokens"] = [vars(token) for token in vocabulary.added]
    made["model"]["vocab"] = {piece.text: i for i, piece in enumerate(vocabulary.pieces)}
    made["model"]["merges"] = _merges(vocabulary.pieces)
    if add_bos:
        single, second = ([{"SpecialToken": {"id": "<s>", "type_id": part}}] for part in (0, 1))
        single += made["post_processor"]["single"]
        second += made["post_processor"]["pair"][1:]
        special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        made["post_processor"] |= {"single": single, "pair": single + second, "special_tokens": special}
    return made


def _of_the_demo(name: str) -> Any:
    """Return a JSON file of the bundled model, whose tokenizer is Phi-3's in all but its pieces."""
    return json.loads((DEMO_CHECKPOINT / name).read_text(encoding="utf-8"))


def sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    """Return a ``tokenizer.model``: SentencePiece's ``ModelProto``, byte-pair encoding with byte fallback.

    Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    fields = (
        _field(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score) + _number(3, piece.type)
        for piece in vocabulary.pieces
    )
    pieces = b"".join(_field(1, piece) for piece in fields)
    trainer = _number(3, 2) + _number(4, len(vocabulary.pieces)) + _number(35, 1)
    trainer += _number(40, 0) + _number(41, 1) + _number(42, 2)
    normalizer = _field(1, b"identity") + _number(3, 1) + _number(4, 0) + _number(5, 1)
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _merges(pieces: tuple[Piece, ...]) -> list[list[str]]:
    # The order of transformers' conversion of slow tokenizers (`generate_merges`): best score first, then the
    # longest left part. Without its order the long runs of spaces, whose scores are all equal, would differ.
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    ranked = []
    for piece in pieces:
        splits = [(piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ranked += [(piece.score, len(left), len(right), left, right) for left, right in known]
    ranked.sort(key=lambda row: row[:3], reverse=True)
    return [[left, right] for *_, left, right in ranked]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
