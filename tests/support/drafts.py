"""Drafts that hold more often than what repeats itself in random texts."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_phi3.engine.drafting import Drafting
from edge_phi3.generation.decoding import Decoder
from edge_phi3.generation.sampling import SequenceDecoder


class Foreseen(Drafting):
    """Drafts what is known to come, with a wrong token now and then.

    `coming` are the sequences of the whole answer, prompt included, or what returns them: None where there are none.
    `last` is the last draft, shape ``(rows, tokens)``.
    """

    def __init__(self, coming: Sequence[ArrayLike] | Callable[[], Sequence[ArrayLike] | None], *, wrong: int) -> None:
        super().__init__()
        self._coming, self._wrong = coming, wrong
        self.last = np.empty((0, 0), np.int32)

    def draft(self, decoder: Decoder, most: int) -> NDArray[np.int32]:
        sequences = self._coming() if callable(self._coming) else self._coming
        if sequences is None or not isinstance(decoder, SequenceDecoder):
            self.last = super().draft(decoder, most)
            return self.last
        length = decoder.history.length
        coming = [np.asarray(sequences[row], np.int32)[length : length + most] for row in decoder.live]
        draft = np.array([tokens[: min(map(len, coming))] for tokens in coming], np.int32)
        draft[:, (length + np.arange(draft.shape[1])) % 7 == 0] = self._wrong
        self.last = draft
        return draft
