"""The pieces of a SentencePiece model file, ``tokenizer.model``.

Our own reader of one message and not the ``sentencepiece`` package: a conversion needs only three fields of
each piece, for which a compiled library of 4 MB (and none for some platforms) is a heavy dependency of a
program that never tokenises with it. Message and field numbers: ``ModelProto`` in
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto; wire format:
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from edge_phi3.conversion.errors import VocabularyError

MAX_BYTES = 64 << 20
"""Largest model file that is read; Phi-3's has half a megabyte."""


class PieceType(enum.IntEnum):
    """``ModelProto.SentencePiece.Type``; GGUF's token types have the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(enum.IntEnum):
    """``TrainerSpec.ModelType``."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float
    type: PieceType


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The parts of ``ModelProto`` that make a vocabulary."""

    pieces: tuple[Piece, ...]
    model_type: ModelType


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read the pieces and the model type of a SentencePiece model.

    Raises:
        VocabularyError: the file is absent, too large, or no sound SentencePiece model.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise VocabularyError(f"{path} is larger than {MAX_BYTES >> 20} MiB, too large for a vocabulary.")
        data = path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return _parse_model(memoryview(data))
    except (_WireError, ValueError) as error:
        raise VocabularyError(f"{path} is not a sound SentencePiece model: {error}. Download it again.") from error


class _WireError(Exception):
    pass


def _parse_model(data: memoryview) -> SentencePieceModel:
    pieces: list[Piece] = []
    model_type = ModelType.UNIGRAM
    for number, value in _fields(data):
        if number == 1 and isinstance(value, memoryview):
            pieces.append(_parse_piece(value, len(pieces)))
        elif number == 2 and isinstance(value, memoryview):
            kinds = [kind for inner, kind in _fields(value) if inner == 3 and isinstance(kind, int)]
            model_type = ModelType(kinds[-1]) if kinds else model_type
    if not pieces:
        raise _WireError("it has no pieces")
    return SentencePieceModel(tuple(pieces), model_type)


def _parse_piece(data: memoryview, index: int) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, memoryview):
            text = str(value, "utf-8")
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = PieceType(value)
    if not text:
        raise _WireError(f"piece {index} is empty")
    if not math.isfinite(score):
        raise _WireError(f"piece {index} has the score {score}")
    return Piece(text, score, kind)


def _fields(data: memoryview) -> Iterator[tuple[int, int | float | memoryview | None]]:
    # The value of a 64-bit field is given as None: no field that is read has one.
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type, length = key & 7, 0
        value: int | float | memoryview | None = None
        if wire_type == 0:
            value, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        elif wire_type == 2:
            length, position = _varint(data, position)
        else:
            raise _WireError(f"a field at byte {position} has the wire type {wire_type}")
        if length > len(data) - position:
            raise _WireError("it ends in the middle of a field")
        if wire_type == 2:
            value = data[position : position + length]
        elif wire_type == 5:
            value = struct.unpack_from("<f", data, position)[0]
        position += length
        yield key >> 3, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            raise _WireError("it ends in the middle of a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _WireError("a number is longer than 64 bits")
