"""Random numbers that depend on a request alone: its seed, the sequence, and how many were drawn before."""

from __future__ import annotations

import secrets

import numpy as np

_DRAWN_AHEAD = 64


def fresh_seed() -> int:
    """Give a seed from the system's entropy."""
    return secrets.randbits(64)


def random_stream(seed: int | None, sequence: int) -> np.random.Generator:
    """Make the stream of one sequence: Philox, a counter-based generator, keyed by seed and sequence.

    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405.

    Args:
        seed: from 0 to 2**64 - 1; None for fresh entropy.
        sequence: index of the sequence within the request.
    """
    key = np.array([fresh_seed() if seed is None else seed, sequence], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class Uniforms:
    """Uniform numbers in [0, 1) of one sequence, drawn ahead because single draws are slow."""

    __slots__ = ("_ahead", "_stream")

    def __init__(self, seed: int, sequence: int) -> None:
        """Start a stream; see `random_stream`."""
        self._stream = random_stream(seed, sequence)
        self._ahead: list[float] = []

    def next(self) -> float:
        """Give the next number."""
        if not self._ahead:
            self._ahead = self._stream.random(_DRAWN_AHEAD)[::-1].tolist()
        return self._ahead.pop()
