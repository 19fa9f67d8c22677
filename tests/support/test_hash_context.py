"""The context that computes nothing: what its cells hold, and what it refuses.

That it agrees with the reference is what every life of the engine proves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edge_phi3.llama import DecodeFailedError
from tests.support.hash_context import Failure, HashContext
from tests.support.reference import Attention, contents_of
from tests.support.scenarios import MODEL, VOCABULARY


def context_of(cells: int = 16, **options: Any) -> HashContext:
    return HashContext(MODEL, cells=cells, sequences=4, batch_size=8, **options)


def decode(context: HashContext, seq_id: int, first: int, tokens: Sequence[int], rows: int = 1) -> Any:
    count = len(tokens)
    context.tokens[:count], context.positions[:count] = tokens, range(first, first + count)
    context.seq_ids[:count], context.wants_logits[:count] = seq_id, 0
    context.wants_logits[count - rows : count] = 1
    return context.decode(count, rows)


def test_every_visible_cell_counts() -> None:
    tokens = [5, 6, 7, 8, 9]
    right = contents_of(tokens, Attention(), 0)
    assert len({*right}) == 5
    assert contents_of(tokens, Attention(), 1)[0] != right[0], "the rotary factors count"
    for place in range(5):
        other = contents_of([*tokens[:place], 10, *tokens[place + 1 :]], Attention(), 0)
        assert all((left == again) == (at < place) for at, (left, again) in enumerate(zip(right, other, strict=True)))
    narrow = contents_of(tokens, Attention(window=3), 0)
    assert narrow[:3] == right[:3]
    assert narrow[3] != right[3]
    context = context_of()
    decode(context, 0, 0, tokens)
    assert context.contents(0) == right


def test_freed_cells_keep_their_content_and_are_used_again() -> None:
    context = context_of(cells=6)
    decode(context, 0, 0, [5, 6, 7])
    context.copy(0, 1)
    context.remove(0, 1, -1)
    assert (context.used, context.held) == (3, 4)
    context.remove(1, -1, -1)
    assert (context.position_range(0), context.position_range(1), context.used) == ((0, 0), (-1, -1), 1)
    stale = context._data.tolist()
    context.clear()
    assert context._data.tolist() == stale
    context.clear(zero=True)
    assert not context._data.any()


def test_without_room_everything_stays() -> None:
    context = context_of(cells=4)
    decode(context, 0, 0, [5, 6, 7])
    state, held = context.save(0, 0, 3), context.contents(0)
    with pytest.raises(DecodeFailedError, match="status 1"):
        decode(context, 1, 0, [5, 6])
    assert not context.restore(1, state, behind=False)
    assert (context.contents(0), context.position_range(1), context.refused) == (held, (-1, -1), 1)


def test_a_failure_leaves_what_was_done_and_spoils_the_rest() -> None:
    context = context_of(failures=[Failure(1, status=-3, done=2)])
    decode(context, 0, 0, [5, 6])
    with pytest.raises(DecodeFailedError, match="status -3"):
        decode(context, 1, 0, [7, 8, 9])
    assert context.position_range(1) == (0, 1)
    context.clear()
    assert np.isnan(decode(context, 0, 0, [5])).all(), "what is no number gets through a mask"
    context.clear(zero=True)
    assert not np.isnan(decode(context, 0, 0, [5])).any()


def test_a_context_may_stay_broken_and_be_aborted() -> None:
    broken, aborted = context_of(failures=[Failure(0, lasting=True)]), context_of()
    aborted.abort()
    for context in (broken, aborted):
        for _ in range(2):
            with pytest.raises(DecodeFailedError):
                context.warm_up()
    working = context_of()
    working.warm_up()
    assert (working.used, working.decoded) == (0, 0)


MISUSE: dict[str, Any] = {
    "a position is left out": lambda context: decode(context, 0, 4, [5]),
    "a position comes twice": lambda context: decode(context, 0, 2, [5]),
    "a sequence begins late": lambda context: decode(context, 1, 1, [5]),
    "there is no such sequence": lambda context: decode(context, 5, 0, [5]),
    "there is no such token": lambda context: decode(context, 1, 0, [VOCABULARY]),
    "other logits are asked for": lambda context: (decode(context, 1, 0, [5]), context.decode(1, 0)),
    "an empty batch": lambda context: context.decode(0, 0),
    "too large a batch": lambda context: context.decode(9, 0),
    "copied onto what is held": lambda context: (context.copy(0, 1), context.copy(0, 1)),
    "copied onto itself": lambda context: context.copy(0, 0),
    "a hole": lambda context: (context.remove(0, 1, 2), decode(context, 0, 3, [5])),
    "not held": lambda context: context.save(0, 0, 4),
    "behind a gap": lambda context: context.restore(1, context.save(0, 1, 3), behind=True),
    "closed": lambda context: (context.close(), decode(context, 1, 0, [5])),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_found(name: str) -> None:
    context = context_of()
    decode(context, 0, 0, [5, 6, 7])
    with pytest.raises(AssertionError):
        MISUSE[name](context)
    assert context.violations


def test_a_token_must_see_its_window_and_no_more() -> None:
    context = context_of(window=3)
    decode(context, 0, 0, [5, 6, 7])
    with pytest.raises(AssertionError, match="sees 4 tokens"):
        decode(context, 0, 3, [8])
    context.remove(0, 0, 2)
    with pytest.raises(AssertionError, match="sees 2 tokens"):
        decode(context, 0, 3, [8])
