"""End tokens, lengths, stop strings and time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.generation import advance
from edge_phi3.generation.stopping import StopStrings
from tests.generation.conftest import END, VOCABULARY, answer, decoder, table_model

PROMPT = (5, 6, 7)
TEXTS: list[str | None] = [None, "", "a", "b", "ab", "ba", "c", " ", "abc", "ca"]


def forced(*tokens: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return logits that allow one token in each row."""
    logits = np.full((len(tokens), VOCABULARY), -np.inf, dtype=np.float32)
    logits[range(len(tokens)), tokens] = 0
    return logits


@pytest.mark.parametrize(
    ("tokens", "strings", "found"),
    [
        ([2, 1, 3], ["ab"], False),  # as in transformers, the window is as many tokens as the string has characters
        ([2, 1, 3], ["ab", "xyz"], True),
        ([2, 0, 3], ["ab"], False),  # nothing reaches across an id without a token
        ([2, 3, 1], ["ab"], False),
        ([0], ["a"], False),
        ([2, 3, 50], ["ab"], False),
    ],
)
def test_stop_strings(tokens: list[int], strings: list[str], found: bool) -> None:
    assert StopStrings(strings, TEXTS).matches(np.array(tokens, dtype=np.int32)) is found


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.text("abc ", min_size=1, max_size=4))
def test_a_stop_string_is_found_exactly_when_it_ends_in_the_newest_token(tokens: list[int], string: str) -> None:
    text = "".join(TEXTS[token] or "" for token in tokens)
    newest = len(TEXTS[tokens[-1]] or "")
    ends = [at + len(string) for at in range(len(text)) if text.startswith(string, at)]
    expected = any(end > len(text) - newest for end in ends)
    assert StopStrings([string], TEXTS).matches(np.array(tokens, dtype=np.int32)) is expected


def test_a_stop_string_may_begin_in_the_prompt() -> None:
    each = decoder([4, 2], vocabulary=TEXTS, stop_strings="abab", do_sample=False, eos_token_id=9)
    advance([each], forced(3))
    assert each.finished
    assert each.result().finish_reasons == ["stop_string"]
    assert each.result().sequences[0].tolist() == [4, 2, 3]


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_return_sequences": 2}, {"num_beams": 2}])
def test_time_runs_out_after_the_step_that_passes_it(options: dict[str, Any]) -> None:
    # The clock is read when the request is made, and after each step.
    times = iter((100.0, 101.0, 102.0, 102.5))
    result = answer(table_model(1), PROMPT, max_time=2.0, clock=lambda: next(times), eos_token_id=[], **options)
    assert set(result.finish_reasons) == {"time"}
    assert {len(tokens) for tokens in result.sequences} == {len(PROMPT) + 3}


@pytest.mark.parametrize(("token", "reason"), [(END, "stop"), (END + 1, "length")])
def test_an_end_token_at_the_last_step_is_a_stop(token: int, reason: str) -> None:
    each = decoder(PROMPT, do_sample=False, max_new_tokens=1)
    advance([each], forced(token))
    assert each.result().finish_reasons == [reason]


@pytest.mark.parametrize("ends", [[], -1])
def test_no_end_token_ends_nothing(ends: object) -> None:
    each = decoder(PROMPT, do_sample=False, max_new_tokens=3, eos_token_id=ends)
    for token in (END, END, END):
        advance([each], forced(token))
    assert each.result().sequences[0].tolist() == [*PROMPT, END, END, END]
