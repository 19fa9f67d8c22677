"""Steps of plain requests whose books are kept at their end choose what `advance` chooses, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.generation import Decoder, GenerationError, ModelDefaults
from edge_phi3.generation.logprobs import watch
from edge_phi3.generation.plain import PlainRows
from edge_phi3.generation.sampling import SequenceDecoder
from tests.generation.conftest import DEFAULTS, END, VOCABULARY, Model, decoder, run, table_model

PROMPT = (5, 6, 7)
LARGE = ModelDefaults(vocab_size=64 * 60, bos_token_id=1, eos_token_ids=(END,), pad_token_id=0, context_length=4096)
"""Enough tokens for the short way of a small top k."""


def run_plainly(model: Model, decoders: list[Decoder]) -> int:
    """Run decoders by streaks of plain steps until all have finished; give how many streaks it took."""
    streaks = 0
    while going := [each for each in decoders if not each.finished]:
        rows = PlainRows.of(going)
        assert rows is not None
        prefixes = [tuple(each.history.tokens[0].tolist()) for each in going]
        steps: list[list[int]] = []
        while not steps or (len(steps) < rows.steps and not rows.ends(steps[-1])):
            steps.append(rows.choose(np.stack([model(prefix) for prefix in prefixes])))
            prefixes = [(*prefix, token) for prefix, token in zip(prefixes, steps[-1], strict=True)]
        rows.accept(steps)
        streaks += 1
    return streaks


def results(decoders: list[Decoder]) -> list[tuple[list[int], list[str]]]:
    return [(each.result().sequences[0].tolist(), list(each.result().finish_reasons)) for each in decoders]


requests = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 20), "do_sample": st.booleans(), "seed": st.integers(0, 2**63)},
    optional={
        "min_new_tokens": st.integers(0, 12),
        "top_k": st.sampled_from([0, 1, 10, 15, 1000]),
        "temperature": st.sampled_from([0.3, 1.0, 1.7, 1e-5]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.02, 0.2]),
        "eos_token_id": st.sampled_from([END, [END, 9, 10], []]),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(requests.filter(lambda options: options["do_sample"] or len(options) < 5), min_size=1, max_size=6),
    st.integers(0, 50),
    st.sampled_from([DEFAULTS, LARGE]),
)
def test_streaks_choose_what_steps_choose(asked: list[dict[str, Any]], seed: int, defaults: ModelDefaults) -> None:
    small = table_model(seed)

    def model(prefix: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        # A few tokens alone are likely, so that what follows depends on more than the last pair's row.
        logits = np.full(defaults.vocab_size, -30, np.float32)
        logits[:VOCABULARY] = small(tuple(token % VOCABULARY for token in prefix))
        return logits

    one_by_one = [decoder(PROMPT, defaults, **options) for options in asked]
    run(model, *((each, PROMPT) for each in one_by_one))
    at_once = [decoder(PROMPT, defaults, **options) for options in asked]
    streaks = run_plainly(model, at_once)
    assert results(at_once) == results(one_by_one)
    assert streaks <= 2 * len(asked)


def test_an_end_token_may_come_when_the_least_length_is_reached() -> None:
    def model(prefix: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        logits = np.zeros(VOCABULARY, np.float32)
        logits[[END, 8]] = 9, 5
        return logits

    each = decoder(PROMPT, do_sample=False, min_new_tokens=4, max_new_tokens=10)
    rows = PlainRows.of([each])
    assert rows is not None
    assert rows.steps == 4
    run_plainly(model, [each])
    assert results([each]) == [([*PROMPT, 8, 8, 8, 8, END], ["stop"])]


def test_a_row_without_a_choice_fails_alone() -> None:
    sound = table_model(1)

    def model(prefix: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        broken = prefix[0] == 6 and len(prefix) == 7
        return np.full(VOCABULARY, np.nan, np.float32) if broken else sound(prefix)

    good, bad = (decoder(prompt, seed=3, max_new_tokens=12, eos_token_id=[]) for prompt in ((5, 6, 7), (6, 6, 7)))
    run_plainly(model, [good, bad])
    alone = decoder((5, 6, 7), seed=3, max_new_tokens=12, eos_token_id=[])
    run(sound, (alone, (5, 6, 7)))
    assert results([good]) == results([alone])
    with pytest.raises(GenerationError, match="no token to sample"):
        bad.result()


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2},
        {"num_beams": 2},
        {"max_time": 5.0},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7]]},
        {"output_scores": True, "return_dict_in_generate": True},
        {"stop_strings": ["x"], "vocabulary": ["x"] * VOCABULARY},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_requests_are_not_plain(options: dict[str, Any]) -> None:
    other, plain = decoder(PROMPT, max_new_tokens=3, **options), decoder(PROMPT, max_new_tokens=3)
    assert PlainRows.of([plain]) is not None
    assert PlainRows.of([plain, other]) is None


def test_requests_for_log_probabilities_are_not_plain() -> None:
    each = decoder(PROMPT, max_new_tokens=3)
    assert isinstance(each, SequenceDecoder)
    watch(each, top=2)
    assert PlainRows.of([each]) is None
