"""The radix tree, against a list of token sequences that is searched from end to end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.engine.prefix_cache import PrefixCache

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)
action = st.one_of(
    st.tuples(st.just("insert"), st.integers(0, 9), tokens, st.booleans()),
    st.tuples(st.just("remove"), st.integers(0, 9)),
)


def array(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def shared(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@settings(max_examples=300, deadline=None)
@given(st.lists(action, max_size=30), st.lists(tokens, min_size=1, max_size=5))
def test_match_is_the_longest_shared_prefix(actions: list[tuple], queries: list[list[int]]) -> None:
    cache, known, evictable = PrefixCache(), {}, []
    for act in actions:
        if act[1] in evictable:
            evictable.remove(act[1])
        known.pop(act[1], None)
        if act[0] == "remove":
            cache.remove(act[1])
            continue
        _, seq_id, values, is_evictable = act
        cache.insert(seq_id, array(values), evictable=is_evictable)
        known[seq_id] = values
        if is_evictable:
            evictable.append(seq_id)
    assert cache.evictable == evictable
    assert len(cache) == len(evictable)
    for query in queries:
        best = max((shared(values, query) for values in known.values()), default=0)
        length, owners = cache.match(array(query))
        assert length == best
        expected = {seq_id for seq_id, values in known.items() if best and shared(values, query) == best}
        assert set(owners) == expected
        assert len(owners) == len(expected)
        whole = {seq_id for seq_id, values in known.items() if values == query[: len(values)]}
        assert set(cache.covered_by(array(query))) == whole & set(evictable)


def test_least_recently_used_leaves_first() -> None:
    cache = PrefixCache()
    for seq_id in range(3):
        cache.insert(seq_id, array([seq_id, 7]), evictable=True)
    cache.touch(0)
    assert cache.evictable == [1, 2, 0]


def test_a_removed_sequence_leaves_nothing_behind() -> None:
    cache = PrefixCache()
    cache.insert(1, array([5, 6, 7]), evictable=True)
    cache.insert(2, array([5, 6, 8]), evictable=True)
    for seq_id in (1, 2):
        cache.remove(seq_id)
    assert cache.match(array([5, 6, 7])) == (0, [])
    assert cache._root.children == {}
