"""How many drafted tokens are checked beside the tokens that must be decoded: as many as make tokens come fastest.

A batch of more tokens takes longer, and a drafted token counts if all before it were what the model chose. What batches
of each size take is measured while they run; how often drafts hold is counted for each request, apart for short and
long matches. Where no size that was measured can pay, nothing is looked up.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.drafting import EXPECTED, Drafting
from edge_phi3.engine.sequence import RunningRequest

_MOST = 31
"""Tokens that are drafted for a sequence at most."""
_TRIAL = 100
"""Batches from one that tries a size which is not known, or not lately, to the next."""
_MARGIN = 1.02
"""How many times more tokens per second must be expected of a larger batch."""
_NEWEST = 0.3
"""The weight of the newest measurement of a size."""
_LEAST_CHANCE = 0.02
"""How likely a drafted token must be to hold: no batch is so cheap that others pay."""
_LEARNED = 0.3
"""The weight of the newest draft in what is expected of those of other requests."""


class Speculation:
    """The drafts of one context: so many tokens for each sequence, or as many as pay, by the `seconds` of batches."""

    def __init__(self, tokens: int | None = None, seconds: Mapping[int, float] | None = None) -> None:
        self._tokens = tokens
        self._seconds = dict(seconds or {})
        self._tried: dict[int, int] = {}
        """The number of the last batch of each size."""
        self._batches = 0
        self.expected = [share for _, share, _ in EXPECTED]
        """How likely tokens of drafts of each kind are to hold in a new request: as much as they lately have in others,
        but no less than what makes each request try."""

    @classmethod
    def of(cls, setting: str, seconds: Mapping[int, float]) -> Self:
        """Return what ``--speculation`` says: "auto", "off", or a number."""
        return cls(None if setting == "auto" else 0 if setting == "off" else int(setting), seconds)

    def took(self, count: int, seconds: float) -> None:
        """Take note that a batch of `count` tokens took so long."""
        known = self._seconds.get(count, seconds)
        self._seconds[count] = known + _NEWEST * (seconds - known)
        self._tried[count] = self._batches
        self._batches += 1

    def judge(self, drafting: Drafting, drafted: int, held: int, rows: int) -> None:
        """Take note that `held` of `drafted` tokens of each row of a request were chosen."""
        drafting.judge(drafted, held, rows, self.expected)
        known, least = self.expected[drafting.kind], EXPECTED[drafting.kind][2]
        share = held / (held + (held < drafted))
        self.expected[drafting.kind] = max(known + _LEARNED * (share - known), least)

    def may_draft(self, requests: Sequence[RunningRequest], rows: int, room: int) -> bool:
        """Return whether there is any use in looking for drafts: one is asked for, may pay, or is to be tried."""
        wanted = {self._wanted(request) for request in requests}
        return any(wanted) or (None in wanted and (self._is_trial or self._may_pay(rows, room)))

    def _wanted(self, request: RunningRequest) -> int | None:
        """Return how many tokens are to be drafted for each row of a request; None for as many as pay."""
        tokens = request.request.config.prompt_lookup_num_tokens
        return self._tokens if tokens is None else tokens

    @property
    def _is_trial(self) -> bool:
        return self._batches % _TRIAL == _TRIAL - 1

    def drafts(
        self, requests: Sequence[tuple[RunningRequest, int]], rows: int, room: int
    ) -> dict[RunningRequest, NDArray[np.int32]]:
        """Return the tokens that are checked in the next batch, shape ``(rows of the request, tokens)``.

        `requests` are those that may have some, each with the most for each of its rows; `room` drafted tokens fit the
        batch beside the `rows` that decode.
        """
        found: dict[RunningRequest, NDArray[np.int32]] = {}
        weighed: list[tuple[float, RunningRequest]] = []
        trial = self._is_trial
        for request, most in requests:
            tokens = self._wanted(request)
            bounds = (most, _MOST if tokens is None else tokens, room // len(request.sequences))
            draft = request.drafting.draft(request.decoder, min(bounds))
            if not draft.shape[1]:
                continue
            found[request] = draft
            if tokens is None:
                share = request.drafting.share(self.expected)
                chances = itertools.accumulate(itertools.repeat(share, draft.shape[1]), operator.mul)
                likely = itertools.takewhile(lambda chance: trial or chance > _LEAST_CHANCE, chances)
                weighed += [(chance, request) for chance in likely]
            else:
                room -= draft.size
                rows += draft.size
        weighed.sort(key=lambda each: -each[0])
        lengths = self._lengths(weighed, rows, room, trial=trial)
        for request in [request for request in found if self._wanted(request) is None]:
            if length := lengths.get(request):
                found[request] = found[request][:, :length]
            else:
                del found[request]
        return found

    def _may_pay(self, rows: int, room: int) -> bool:
        """Return whether a larger batch would pay if all that was drafted held."""
        alone = self._seconds.get(rows)
        if alone is None:
            return False
        sizes = (size for size in self._seconds if rows < size <= rows + min(room, rows * _MOST))
        return any(size / self._seconds[size] > _MARGIN * rows / alone for size in sizes)

    def _lengths(
        self, weighed: list[tuple[float, RunningRequest]], rows: int, room: int, *, trial: bool
    ) -> dict[RunningRequest, int]:
        """Return how many tokens are drafted for each row of each request.

        `weighed` are the tokens that may be, the likeliest to hold first, each for all rows of its request.
        """
        alone = self._seconds.get(rows)
        best, taken = _MARGIN * rows / alone if alone else np.inf, 0
        size, expected = rows, float(rows)
        unknown: list[tuple[int, int]] = []
        for number, (share, request) in enumerate(weighed, 1):
            size += len(request.sequences)
            expected += share * len(request.sequences)
            if size - rows > room:
                break
            if size in self._seconds and expected / self._seconds[size] > best:
                best, taken = expected / self._seconds[size], number
            if number & (number - 1) == 0:  # sizes that are worth knowing: 1, 2, 4, ... tokens more
                unknown.append((self._tried.get(size, -1), number))
        if trial and unknown:
            taken = min(unknown)[1]
        lengths: dict[RunningRequest, int] = {}
        for _, request in itertools.islice(weighed, taken):
            lengths[request] = lengths.get(request, 0) + 1
        return lengths
