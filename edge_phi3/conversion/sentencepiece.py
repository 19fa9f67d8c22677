"""The pieces of a SentencePiece model file, ``tokenizer.model``.

Read with ``protobuf`` and not the ``sentencepiece`` package: a conversion needs three fields of each piece, and a
library that tokenises is a heavy dependency of a program that never does. Message and field numbers: ``ModelProto`` in
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

import enum
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from edge_phi3.conversion.errors import CheckpointError
from edge_phi3.files import read_bounded

MAX_BYTES = 64 << 20
"""Largest model file that is read; Phi-3's has half a megabyte."""

_BYTES, _FLOAT, _INT, _MESSAGE = 12, 2, 5, 11  # FieldDescriptorProto.Type
_MESSAGES: dict[str, list[tuple[str, int, int]]] = {
    "Piece": [("piece", 1, _BYTES), ("score", 2, _FLOAT), ("type", 3, _INT)],
    "Trainer": [("model_type", 3, _INT)],
    "Model": [("Piece", 1, _MESSAGE), ("Trainer", 2, _MESSAGE)],
}


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
