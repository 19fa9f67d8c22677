"""Drafts out of a text itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_phi3.engine.drafting import PromptLookup


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([], ([], 0)),
        ([1], ([], 0)),
        ([1, 2, 3], ([], 0)),
        ([1, 2, 3, 4, 5, 9, 1, 2], ([3, 4, 5], 2)),
        ([1, 2, 3, 4, 9, 1, 2, 7, 8, 9, 1, 2], ([7, 8, 9], 3)),  # of equal matches the newest
        ([5, 1, 2, 3, 4, 9, 1, 2, 7, 8, 5, 1, 2], ([3, 4, 9], 3)),  # but a longer one before it
        ([1, 2, 1, 2], ([1, 2, 1], 2)),  # what repeats goes on repeating
        ([7, 7, 7], ([7, 7, 7], 2)),
    ],
)
def test_what_followed_the_longest_match_is_drafted(text: list[int], draft: tuple[list[int], int]) -> None:
    assert PromptLookup().draft(np.array(text, np.int32), 3) == draft


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_it_does_not_matter_when_tokens_come(text: list[int], most: int) -> None:
    tokens, growing = np.array(text, np.int32), PromptLookup()
    for end in range(len(text) + 1):
        found = drafted, matched = growing.draft(tokens[:end], most)
        assert found == PromptLookup().draft(tokens[:end], most)
        assert len(drafted) == (most if matched else 0)
        if matched:
            before = text[:end] + drafted
            ends = text[end - matched : end]
            assert any(
                text[at : at + matched] == ends and before[at + matched :][:most] == drafted
                for at in range(end - matched)
            )
