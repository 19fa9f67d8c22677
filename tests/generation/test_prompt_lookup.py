"""Drafts out of a text itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_phi3.generation.prompt_lookup import Draft, PromptLookup


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([], Draft([], 0)),
        ([1], Draft([], 0)),
        ([1, 2, 3], Draft([], 0)),
        ([1, 2, 3, 4, 5, 9, 1, 2], Draft([3, 4, 5], 2)),
        ([1, 2, 3, 4, 9, 1, 2, 7, 8, 9, 1, 2], Draft([7, 8, 9], 3)),  # of equal matches the newest
        ([5, 1, 2, 3, 4, 9, 1, 2, 7, 8, 5, 1, 2], Draft([3, 4, 9], 3)),  # but a longer one before it
        ([1, 2, 1, 2], Draft([1, 2, 1], 2)),  # what repeats goes on repeating
        ([7, 7, 7], Draft([7, 7, 7], 2)),
    ],
)
def test_what_followed_the_longest_match_is_drafted(text: list[int], draft: Draft) -> None:
    assert PromptLookup().draft(np.array(text, np.int32), 3) == draft


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_it_does_not_matter_when_tokens_come(text: list[int], most: int) -> None:
    tokens, growing = np.array(text, np.int32), PromptLookup()
    for end in range(len(text) + 1):
        found = growing.draft(tokens[:end], most)
        assert found == PromptLookup().draft(tokens[:end], most)
        assert len(found.tokens) == (most if found.matched else 0)
        if found.matched:
            before = text[:end] + found.tokens
            ends = text[end - found.matched : end]
            assert any(
                text[at : at + found.matched] == ends and before[at + found.matched :][:most] == found.tokens
                for at in range(end - found.matched)
            )
