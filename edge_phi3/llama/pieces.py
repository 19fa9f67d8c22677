"""SentencePiece vocabularies, as Phi-3's: what finds their pieces in a text, in time linear in its length.

llama.cpp's own is quadratic on runs of characters that no piece has, and on runs of line breaks.
"""

import os
from collections.abc import Mapping
from typing import Final

from tokenizers import Tokenizer, models

SPACE: Final = "▁"
"""What stands for a space in pieces, and in texts whose pieces are looked for."""

# Its own threads would take the cores from those that decode.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def tokenizer(vocabulary: Mapping[str, int], scores: Mapping[str, float], unknown: str | None) -> Tokenizer:
    """Return what encodes a text whose spaces are `SPACE`, without added tokens.

    Every way to join two pieces to a third is a merge, in the order of the third's score, as in the ``tokenizer.json``
    that transformers makes of a SentencePiece model.

    Args:
        vocabulary: the id of each piece.
        scores: of the pieces that others are joined to.
        unknown: the piece of characters without one of their own, where not all bytes are pieces.
    """
    merges = sorted(
        (-score, -cut, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    )
    pairs = [(left, right) for _, _, left, right in merges]
    return Tokenizer(models.BPE(dict(vocabulary), pairs, byte_fallback=True, unk_token=unknown, fuse_unk=True))
