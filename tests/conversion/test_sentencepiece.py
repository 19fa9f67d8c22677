"""The reader of tokenizer.model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.conversion.errors import VocabularyError
from edge_phi3.conversion.sentencepiece import MAX_BYTES, ModelType, read_sentencepiece
from tests.golden.vocabularies import Piece, Vocabulary, phi3_vocabulary, sentencepiece_model

PIECE = b"\x0a\x03abc"
"""The field of a piece's text."""


def message(*fields: bytes) -> bytes:
    """A model with one piece, of these fields."""
    body = b"".join(fields)
    return b"\x0a" + bytes([len(body)]) + body


def read(tmp_path: Path, content: bytes) -> list[tuple[str, float, int]]:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    return [(piece.text, piece.score, int(piece.type)) for piece in read_sentencepiece(path).pieces]


def test_the_whole_phi3_vocabulary_comes_back(tmp_path: Path) -> None:
    vocabulary = phi3_vocabulary()
    pieces = read(tmp_path, sentencepiece_model(vocabulary))
    assert pieces == [(piece.text, piece.score, piece.type) for piece in vocabulary.pieces]
    assert read_sentencepiece(tmp_path / "tokenizer.model").model_type is ModelType.BPE


def test_absent_fields_have_their_defaults_and_unknown_ones_are_skipped(tmp_path: Path) -> None:
    unknown = b"\x78\x01" + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\x7a\x02xy"
    assert read(tmp_path, unknown + message(PIECE, unknown)) == [("abc", 0.0, 1)]
    assert read_sentencepiece(tmp_path / "tokenizer.model").model_type is ModelType.UNIGRAM


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it has no pieces"),
        (b"\x0a\x05\x0a\x03ab", "it ends in the middle of a field"),
        (message(b"\x0a\x7fabc"), "it ends in the middle of a field"),
        (message(PIECE, b"\x15\x00\x00"), "it ends in the middle of a field"),
        (b"\x0a", "it ends in the middle of a number"),
        (b"\xff" * 11, "a number is longer than 64 bits"),
        (message(PIECE, b"\x1b"), "wire type 3"),
        (message(b"\x15\x00\x00\x80\x3f"), "piece 0 is empty"),
        (message(PIECE, b"\x15\x00\x00\xc0\x7f"), "piece 0 has the score nan"),
        (message(PIECE, b"\x18\x09"), "9 is not a valid PieceType"),
        (message(b"\x0a\x02\xff\xfe"), "can't decode"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n", "is not a sound SentencePiece"),
    ],
)
def test_a_damaged_model_is_refused_in_a_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=sentence):
        read(tmp_path, content)


def test_an_absent_or_enormous_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="cannot be read: No such file"):
        read_sentencepiece(tmp_path / "tokenizer.model")
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(VocabularyError, match="larger than 64 MiB"):
        read_sentencepiece(tmp_path / "tokenizer.model")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_bytes_makes_the_reader_fail_in_another_way(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(sentencepiece_model(Vocabulary((Piece("▁a", -1.0), Piece("b", -2.5, 4)), ())))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        pieces = read(folder, bytes(content[: data.draw(st.integers(0, len(content)))]))
    except VocabularyError:
        return
    assert pieces
