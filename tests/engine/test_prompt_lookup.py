"""Drafts out of a text itself."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_phi3.engine.drafting import PromptLookup
from tests.support.cases import cases


@cases
def test_what_followed_the_longest_match_is_drafted(text: list[int], drafted: list[int], matched: int) -> None:
    assert PromptLookup().draft(np.array(text, np.int32), 3) == (drafted, matched)


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
