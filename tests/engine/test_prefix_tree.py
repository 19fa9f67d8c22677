"""The radix tree, against a list of token sequences that is searched from end to end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.engine.prefix_tree import PrefixTree

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)
action = st.one_of(
    st.tuples(st.just("insert"), st.integers(0, 9), tokens),
    st.tuples(st.just("remove"), st.integers(0, 9)),
)


def array(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def shared(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@settings(max_examples=300, deadline=None)
@given(st.lists(action, max_size=30), st.lists(tokens, min_size=1, max_size=5))
def test_match_is_the_longest_shared_prefix(actions: list[tuple], queries: list[list[int]]) -> None:
    tree, known = PrefixTree(), {}
    for act in actions:
        known.pop(act[1], None)
        if act[0] == "remove":
            tree.remove(act[1])
            continue
        _, owner, values = act
        tree.insert(owner, array(values))
        known[owner] = values
    for query in queries:
        best = max((shared(values, query) for values in known.values()), default=0)
        length, owners = tree.match(array(query))
        assert length == best
        expected = {owner for owner, values in known.items() if best and shared(values, query) == best}
        assert set(owners) == expected
        assert len(owners) == len(expected)


def test_a_removed_sequence_leaves_nothing_behind() -> None:
    tree = PrefixTree()
    tree.insert(1, array([5, 6, 7]))
    tree.insert(2, array([5, 6, 8]))
    for owner in (1, 2):
        tree.remove(owner)
    assert tree.match(array([5, 6, 7])) == (0, [])
    assert tree._root.children == {}
